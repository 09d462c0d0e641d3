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

    Expert e's rows are ``plan.offsets_E1[e]`` to ``plan.offsets_E1[e + 1]``.

    Args:
        x_TD: tokens [T, D], any float dtype.
        plan: their routing plan.

    Returns:
        [R, D] in the dtype of ``x_TD``. Differentiable in ``x_TD``.

    Raises:
        TypeError: ``plan`` is no :class:`RoutingPlan`, ``x_TD`` is not floating-point.
        ValueError: ``x_TD`` is not 2-dimensional, or not of the plan's T tokens or device.
        RuntimeError: a double backward, a forced backend that can't run.
    """
    check_plan("permute", plan)
    return _Permute.apply(x_TD, plan)


def unpermute(y_RD: Tensor, plan: RoutingPlan, weights_TK: Tensor | None = None) -> Tensor:
    """Sum each token's K expert rows: [R, D] -> [T, D], weighted when ``weights_TK`` [T, K] is given.

    Sums in fp32 (fp64 for fp64), k ascending. Rows of dropped slots are never read.

    Args:
        y_RD: rows in expert order [R, D], any float dtype.
        plan: the routing plan of the rows.
        weights_TK: optional [T, K], any float dtype.

    Returns:
        [T, D] in the dtype of ``y_RD``. Differentiable in ``y_RD`` and ``weights_TK``.

    Raises:
        TypeError: ``plan`` is no :class:`RoutingPlan`, a tensor is not floating-point.
        ValueError: ``y_RD`` is not [R, D] or ``weights_TK`` not [T, K] of the plan, or they are not on its device.
        RuntimeError: a double backward, a forced backend that can't run.
    """
    check_plan("unpermute", plan)
    return _Unpermute.apply(y_RD, weights_TK, plan)
