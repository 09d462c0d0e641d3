"""d_activation: dA' = dO[token(r)] . W_down[e], then A' = s A, dS = <dA', A>, dH = s dA' act'(H), in two launches.

    dO [T, D] · W_down [E, D, I], with H [R, N], s [T, K] -> dH [R, N] (may be H's memory), A' [R, I], dS [T, K]

1. gathered product   dA' into the memory of A', by gate_up's kernel with H as its only output: W_down is W^T
2. rows               reads H and dA'; writes dH, A' over dA', dS at the slot of each row

Why two: an epilogue would hold dA', gate, up and three results beside the accumulator and leave the products waiting.
Apart, it runs at the rate of the memory and costs one more write and read of R*I elements, in memory that A' needs
anyway.
Tiling of the second: a program takes ROWS whole rows, COLUMNS of each at a time, so dS is one sum in a fixed order and
every element of H and A' has one program that reads it and then writes it. Row offsets are int64. Rows past
offsets[E], dropped slots, are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._activation import gated_activation, plain_activation
from moe_kernels.backends.triton._launch import Launch, cdiv, launch
from moe_kernels.backends.triton.gate_up import launch_gathered

_ELEMENTS = 1024  # of a step: 4 warps, 16 bytes of half precision a thread from each of dA', gate and up
_COLUMNS = 256  # a warp's 16-byte accesses lie in one row


@triton.jit(do_not_specialize_on_alignment=["weights_ptr"])
def activation_backward_kernel(
    h_ptr,
    dh_ptr,
    a_ptr,
    weights_ptr,
    d_weights_ptr,
    offsets_ptr,
    slots_ptr,
    num_experts,
    I,  # noqa: E741
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = o_r < tl.load(offsets_ptr + num_experts)
    slots = tl.load(slots_ptr + o_r, mask=kept, other=0)
    s = tl.load(weights_ptr + slots, mask=kept, other=0.0).to(tl.float32)[:, None]
    element = dh_ptr.dtype.element_ty
    d_s = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(0, I, COLUMNS):
        o_n = n + tl.arange(0, COLUMNS)
        mask = kept[:, None] & (o_n < I)[None, :]
        at_h = o_r[:, None] * (2 * I if GATED else I) + o_n[None, :]
        p_a = a_ptr + o_r[:, None] * I + o_n[None, :]
        if INTERLEAVED:
            o_pair = 2 * n + tl.arange(0, 2 * COLUMNS)
            at_pair = o_r[:, None] * (2 * I) + o_pair[None, :]
            pair_mask = kept[:, None] & (o_pair < 2 * I)[None, :]
            pair = tl.load(h_ptr + at_pair, mask=pair_mask, other=0.0)
            gate, up = tl.split(pair.reshape(ROWS, COLUMNS, 2))
        else:
            gate = tl.load(h_ptr + at_h, mask=mask, other=0.0)
            up = tl.load(h_ptr + at_h + I, mask=mask, other=0.0) if GATED else gate
        d_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()  # the threads that read an element and write it differ where H isn't 16-byte aligned

        d_scaled = d_a * s
        if GATED:
            a, da_dg, da_du = gated_activation(gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACTIVATION)
            d_gate, d_up = (d_scaled * da_dg).to(element), (d_scaled * da_du).to(element)
            if INTERLEAVED:
                tl.store(dh_ptr + at_pair, tl.join(d_gate, d_up).reshape(ROWS, 2 * COLUMNS), mask=pair_mask)
            else:
                tl.store(dh_ptr + at_h, d_gate, mask=mask)
                tl.store(dh_ptr + at_h + I, d_up, mask=mask)
        else:
            a, da_dg = plain_activation(gate.to(tl.float32), ACTIVATION)
            tl.store(dh_ptr + at_h, (d_scaled * da_dg).to(element), mask=mask)
        tl.store(p_a, (a * s).to(element), mask=mask)
        d_s += d_a * a  # columns past I are zero in d_a
    tl.store(d_weights_ptr + slots, tl.sum(d_s, axis=1), mask=kept)


def d_activation(
    dh_RN: Tensor,
    d_out_TD: Tensor,
    w_down_EDI: Tensor,
    h_RN: Tensor,
    weights_TK: Tensor,
    offsets_E1: Tensor,
    slots_R: Tensor,
    tiles_2M: Tensor,
    block_m: int,
    activation: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Writes dH into ``dh_RN``, which may be ``h_RN`` itself; returns A' = s * A and dS."""
    rows, inner = h_RN.shape[0], w_down_EDI.shape[2]
    a_RI = h_RN.new_empty(rows, inner)
    # Zeros, because no program writes a dropped slot.
    d_weights_TK = h_RN.new_zeros(weights_TK.shape, dtype=torch.float32)
    if rows == 0:
        return a_RI, d_weights_TK
    plan = (offsets_E1, slots_R, tiles_2M, block_m, weights_TK.shape[1])
    launch_gathered("d_activation", d_out_TD, w_down_EDI.mT, None, a_RI, None, *plan, None)
    columns = min(_COLUMNS, triton.next_power_of_2(inner))
    block_rows = _ELEMENTS // columns
    launch(
        h_RN.device,
        Launch(
            activation_backward_kernel,
            (cdiv(rows, block_rows),),
            {
                "h_ptr": h_RN,
                "dh_ptr": dh_RN,
                "a_ptr": a_RI,
                "weights_ptr": weights_TK.contiguous(),
                "d_weights_ptr": d_weights_TK,
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "num_experts": offsets_E1.shape[0] - 1,
                "I": inner,
                "alpha": alpha or 0.0,
                "limit": limit or 0.0,
            },
            {
                "ACTIVATION": activation,
                "GATED": h_RN.shape[1] != inner,
                "INTERLEAVED": interleaved,
                "ROWS": block_rows,
                "COLUMNS": columns,
            },
            4,
            1,
        ),
    )
    return a_RI, d_weights_TK
