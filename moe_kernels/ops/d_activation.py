"""d_activation: the product that opens the backward, and everything that hangs on it.

    dA'[r] = dO[token(r)] . W_down[e]           unscaled, [R, I]
    A[r]   = act(H[r]),  s = weights[slot(r)]
    A'[r]  = s * A[r]                           what dW_down needs beside dO
    dS     = <dA'[r], A[r]>                     gradient of the routing weight (without a down bias)
    dH[r]  = s * dA'[r] * act'(H[r])            pre-activation gradient

W_down is [E, D, I]. H and dH have gate columns before up columns, or in turn where they are ``interleaved``; where a
clamp held a value its gradient is zero. ``d_activation`` returns dH in a tensor of its own; ``d_activation_`` writes it
over H, which saves R*N elements and consumes H. dS is fp32 [T, K], zero for dropped slots, summed in a fixed order.
Source: SonicMoE (arXiv 2512.14080) for dS from <dA', A> and A' in one epilogue.
"""

import torch

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define
from moe_kernels.ops.gate_up import activation_width, check_plan, traits


def _check(d_out_TD, w_down_EDI, h_RN, weights_TK, offsets_E1, slots_R, tiles_2M, block_m, activation, *options):
    op = "d_activation"
    c.check_activation(op, activation, *options)
    c.check_matrix(op, "d_out", d_out_TD, 2, "[T, D]")
    c.check_matrix(op, "w_down", w_down_EDI, 3, "[E, D, I]")
    c.check_like(op, "w_down", w_down_EDI, d_out_TD, "d_out")
    c.check_size(op, "w_down", w_down_EDI, 1, d_out_TD.shape[1], "D of d_out")
    c.check_matrix(op, "h", h_RN, 2, "[R, 2I] (gated) or [R, I]")
    c.check_like(op, "h", h_RN, d_out_TD, "d_out")
    if not h_RN.is_contiguous():
        c.fail(op, "h", h_RN, f"contiguous, not strided {h_RN.stride()}")
    if activation_width(h_RN.shape[1], activation) != w_down_EDI.shape[2]:
        c.fail(op, "h", h_RN, f"of a width that {activation} turns into I = {w_down_EDI.shape[2]} of w_down")
    c.check_matrix(op, "weights", weights_TK, 2, "[T, K]")
    c.check_weights(op, weights_TK, d_out_TD.shape[0], weights_TK.shape[1], d_out_TD, "d_out")
    c.check_size(op, "h", h_RN, 0, weights_TK.numel(), "R = T * K of weights")
    c.check_index(op, "slots", slots_R, 1, "[R]", d_out_TD)
    c.check_size(op, "slots", slots_R, 0, h_RN.shape[0], "R of h")
    check_plan(op, d_out_TD, offsets_E1, tiles_2M, block_m, w_down_EDI.shape[0], h_RN.shape[0])


def _fake_over_h(d_out_TD, w_down_EDI, h_RN, weights_TK, *_):
    return h_RN.new_empty(h_RN.shape[0], w_down_EDI.shape[2]), h_RN.new_empty(
        weights_TK.shape, dtype=torch.promote_types(h_RN.dtype, torch.float32)
    )


def _kernel_apart(run, d_out, w_down, h, *rest):
    dh = torch.empty_like(h)
    return (dh, *run(dh, d_out, w_down, h, *rest))


_ARGUMENTS = (
    "Tensor weights, Tensor offsets, Tensor slots, Tensor tiles, int block_m, str activation, "
    f"{c.ACTIVATION_OPTIONS}) -> "
)


def _problem(
    d_out, w_down, h, weights, offsets, slots, tiles, block_m, activation, alpha=None, limit=None, interleaved=False
):
    dims = (w_down.shape[1], w_down.shape[2])
    asked = traits(w_down, activation=activation, interleaved=interleaved)
    return Problem(d_out.device, d_out.dtype, dims, block_m, asked)


define(
    f"d_activation(Tensor d_out, Tensor w_down, Tensor h, {_ARGUMENTS}(Tensor, Tensor, Tensor)",
    check=_check,
    fake=lambda *args: (torch.empty_like(args[2]), *_fake_over_h(*args)),
    problem=_problem,
    kernel=_kernel_apart,
)
define(
    f"d_activation_(Tensor d_out, Tensor w_down, Tensor(a!) h, {_ARGUMENTS}(Tensor, Tensor)",
    check=_check,
    fake=_fake_over_h,
    problem=_problem,
    kernel=lambda run, d_out, w_down, h, *rest: run(h, d_out, w_down, h, *rest),
)
