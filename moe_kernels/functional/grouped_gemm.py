"""One product per expert over the rows it owns."""

import torch
from torch import Tensor

from moe_kernels.functional.routing_plan import RoutingPlan, check_plan, refuse_double_backward
from moe_kernels.ops import _contract as c


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_RC, w, bias_EN, plan, trans_w):
        ctx.save_for_backward(a_RC, w)
        ctx.plan, ctx.trans_w = plan, trans_w
        return _product(a_RC, w, bias_EN, plan, trans_w)

    @staticmethod
    def backward(ctx, d_y_RN):
        refuse_double_backward("grouped_gemm")
        a_RC, w = ctx.saved_tensors
        plan, d_y_RN = ctx.plan, d_y_RN.contiguous()
        d_a = d_w = d_bias = None
        if ctx.needs_input_grad[0]:
            d_a = _product(d_y_RN, w, None, plan, not ctx.trans_w)
            past_R = torch.arange(d_a.shape[0], device=d_a.device) >= plan.offsets_E1[-1]
            d_a = d_a.masked_fill_(past_R[:, None], 0)  # rows that no expert owns are not written by the product
        if ctx.needs_input_grad[1]:
            d_w, d_bias = torch.ops.moe_kernels.grouped_wgrad(
                d_y_RN, a_RC, plan.offsets_E1, plan.slots_R, plan.top_k, "none", ctx.needs_input_grad[2], w.dtype
            )
            d_w = d_w if ctx.trans_w else d_w.mT
        elif ctx.needs_input_grad[2]:
            d_bias = row_sums(d_y_RN, plan, w.dtype)
        return d_a, d_w, d_bias if ctx.needs_input_grad[2] else None, None, None


def row_sums(rows_RN: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
    """[E, N]: the sum of each expert's rows."""
    nothing = rows_RN[:, :0]
    return torch.ops.moe_kernels.grouped_wgrad(
        rows_RN, nothing, plan.offsets_E1, plan.slots_R, plan.top_k, "none", True, dtype
    )[1]


def _product(a_RC, w, bias_EN, plan, trans_w):
    return torch.ops.moe_kernels.grouped_gemm(a_RC, w, bias_EN, plan.offsets_E1, plan.tiles_2M, plan.block_m, trans_w)


def grouped_gemm(
    a_RC: Tensor, w: Tensor, plan: RoutingPlan, *, bias_EN: Tensor | None = None, trans_w: bool = True
) -> Tensor:
    """Multiply the rows of each expert by that expert's matrix.

    Args:
        a_RC: rows in expert order [R, C], e.g. from :func:`permute`; any float dtype.
        w: [E, N, C] as nn.Linear stores it (``trans_w``), or [E, C, N]; of the dtype of ``a_RC``.
        plan: the routing plan of the rows.
        bias_EN: optional [E, N], of the dtype of ``a_RC``.

    Returns:
        [R, N] in the dtype of ``a_RC``. Rows of dropped slots are not written. Differentiable in ``a_RC``, ``w`` and
        ``bias_EN``.

    Raises:
        TypeError: ``plan`` is no :class:`RoutingPlan`, a tensor is not floating-point or not of the dtype of ``a_RC``.
        ValueError: a tensor of the wrong shape, or not of the plan's R rows, E experts or device.
        RuntimeError: a double backward, a forced backend that can't run.
    """
    check_plan("grouped_gemm", plan)
    if a_RC.dim() == 2:
        c.check_size("grouped_gemm", "a", a_RC, 0, plan.slots_R.shape[0], "R of the plan")
    return _GroupedGemm.apply(a_RC, w, bias_EN, plan, trans_w)
