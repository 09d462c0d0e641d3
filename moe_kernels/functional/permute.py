"""Token rows to expert order and back: the two halves of a MoE layer around any per-expert function."""

import torch
from torch import Tensor

from moe_kernels.functional.routing_plan import RoutingPlan, check_plan, refuse_double_backward


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, plan):
        ctx.plan = plan
        return torch.ops.moe_kernels.permute(x_TD, None, plan.offsets_E1, plan.slots_R, plan.positions_TK)

    @staticmethod
    def backward(ctx, d_rows_RD):
        refuse_double_backward("permute")
        return torch.ops.moe_kernels.unpermute(d_rows_RD.contiguous(), ctx.plan.positions_TK, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, weights_TK, plan):
        ctx.plan = plan
        ctx.save_for_backward(y_RD if ctx.needs_input_grad[1] else None, weights_TK)
        return torch.ops.moe_kernels.unpermute(y_RD, plan.positions_TK, weights_TK)

    @staticmethod
    def backward(ctx, d_out_TD):
        refuse_double_backward("unpermute")
        y_RD, weights_TK = ctx.saved_tensors
        plan = ctx.plan
        d_out_TD = d_out_TD.contiguous()
        arguments = plan.offsets_E1, plan.slots_R, plan.positions_TK
        d_y_RD = d_weights_TK = None
        if ctx.needs_input_grad[0]:
            d_y_RD = torch.ops.moe_kernels.permute(d_out_TD, weights_TK, *arguments)
        if ctx.needs_input_grad[1]:
            rows_RD = torch.ops.moe_kernels.permute(d_out_TD, None, *arguments)
            acc = torch.promote_types(y_RD.dtype, torch.float32)
            dots_R = (rows_RD.to(acc) * y_RD.to(acc)).sum(-1)
            kept = plan.positions_TK >= 0
            d_weights_TK = torch.where(kept, dots_R[plan.positions_TK.clamp(min=0)], 0).to(weights_TK.dtype)
        return d_y_RD, d_weights_TK, None


def permute(x_TD: Tensor, plan: RoutingPlan) -> Tensor:
    """Copy each token's row to its K places in expert order: [T, D] -> [R, D]; rows of dropped slots are zero.

    Differentiable in ``x_TD``. Expert e's rows are ``plan.offsets_E1[e]`` to ``plan.offsets_E1[e + 1]``.
    """
    check_plan("permute", plan)
    return _Permute.apply(x_TD, plan)


def unpermute(y_RD: Tensor, plan: RoutingPlan, weights_TK: Tensor | None = None) -> Tensor:
    """Sum each token's K expert rows: [R, D] -> [T, D], weighted when ``weights_TK`` [T, K] is given.

    Sums in fp32, k ascending. Differentiable in both. Rows of dropped slots are never read.
    """
    check_plan("unpermute", plan)
    return _Unpermute.apply(y_RD, weights_TK, plan)
