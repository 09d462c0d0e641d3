"""d_activation: dA' = dO[token(r)] . W_down[e], and in the epilogue A' = s A, dS = <dA', A>, dH = s dA' act'(H).

    dO [T, D] · W_down [E, D, I], with H [R, N], s [T, K] -> dH [R, N] (may be H's memory), A' [R, I], dS [T, K]

Tiling: a program makes BLOCK_M rows of one expert times BLOCK_N columns of I; rows of dO are gathered by pointer
loads. The epilogue reads the gate and up columns of H that its tile covers and writes dH at the same places: every
element has one reader and one writer, a barrier between them, so H can be overwritten. It works on ``SUBTILES`` column
parts in turn, since dA', gate, up and the three results of the whole tile do not fit the registers. dS is a sum over
all I columns: each column tile writes its partial sum, and they are added in a fixed order afterwards (a float atomic
would make it depend on timing).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._activation import nonlinearity
from moe_kernels.backends.triton._launch import (
    Launch,
    capability,
    cdiv,
    input_precision,
    launch,
    matrix_descriptor,
    num_sms,
    rows_contiguous,
)
from moe_kernels.backends.triton._tile import halves, load_columns, tile_position, weight_tile
from moe_kernels.backends.triton.configs import tiles


@triton.jit
def _epilogue(
    d_a,
    n,
    tensors,
    rows,
    I,  # noqa: E741
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One column part: writes its dH and A', returns its share of dS [BLOCK_M]."""
    h_ptr, dh_ptr, a_ptr = tensors
    o_m, m_m, s = rows
    o_m = o_m.to(tl.int64)[:, None]
    o_n = n + tl.arange(0, COLUMNS)
    mask = m_m[:, None] & (o_n < I)[None, :]
    at_h = o_m * (2 * I if GATED else I) + o_n[None, :]
    gate = tl.load(h_ptr + at_h, mask=mask, other=0.0).to(tl.float32)
    f, df = nonlinearity(gate, ACTIVATION)
    d_scaled = d_a * s[:, None]
    element = dh_ptr.dtype.element_ty
    if GATED:
        up = tl.load(h_ptr + at_h + I, mask=mask, other=0.0).to(tl.float32)
        a = f * up
        tl.debug_barrier()  # every thread has read its part of H
        tl.store(dh_ptr + at_h, (d_scaled * up * df).to(element), mask=mask)
        tl.store(dh_ptr + at_h + I, (d_scaled * f).to(element), mask=mask)
    else:
        a = f
        tl.debug_barrier()
        tl.store(dh_ptr + at_h, (d_scaled * df).to(element), mask=mask)
    tl.store(a_ptr + o_m * I + o_n[None, :], (a * s[:, None]).to(a_ptr.dtype.element_ty), mask=mask)
    return tl.sum(d_a * a, axis=1)  # columns past I are zero in a


@triton.jit(do_not_specialize=["num_m_tiles", "num_slots"], do_not_specialize_on_alignment=["weights_ptr"])
def d_activation_kernel(
    d_out_ptr,
    w_desc,
    h_ptr,
    dh_ptr,
    a_ptr,
    weights_ptr,
    partial_ptr,
    offsets_ptr,
    slots_ptr,
    tiles_ptr,
    num_m_tiles,
    num_slots,
    stride_d_out,
    D,
    I,  # noqa: E741
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    N_MAJOR: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_n_tiles = tl.cdiv(I, BLOCK_N)
    for tile in range(tl.program_id(0), num_m_tiles * num_n_tiles, tl.num_programs(0)):
        i_m, i_n = tile_position(tile, num_m_tiles, num_n_tiles, GROUP_M)
        expert = tl.load(tiles_ptr + i_m)
        if expert >= 0:
            first = tl.load(tiles_ptr + num_m_tiles + i_m)
            end = tl.load(offsets_ptr + expert + 1)
            o_m = first + tl.arange(0, BLOCK_M)
            slots = tl.load(slots_ptr + tl.minimum(o_m, end - 1))
            p_d_out = d_out_ptr + (slots // TOP_K).to(tl.int64)[:, None] * stride_d_out
            o_k = tl.arange(0, BLOCK_K)
            n = i_n * BLOCK_N

            d_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, D, BLOCK_K):
                d_out = load_columns(p_d_out, k + o_k, D, EVEN_D)
                w = weight_tile(w_desc, expert, n, k, BLOCK_N, BLOCK_K, N_MAJOR)
                d_a = tl.dot(d_out, w, d_a, input_precision=PRECISION)

            m_m = o_m < end
            s = tl.load(weights_ptr + slots).to(tl.float32)
            tensors = (h_ptr, dh_ptr, a_ptr)
            rows = (o_m, m_m, s)
            PART: tl.constexpr = BLOCK_N // SUBTILES
            if SUBTILES == 1:
                d_s = _epilogue(d_a, n, tensors, rows, I, ACTIVATION, GATED, PART)
            else:
                left, right = halves(d_a, BLOCK_M, BLOCK_N)
                if SUBTILES == 2:
                    d_s = _epilogue(left, n, tensors, rows, I, ACTIVATION, GATED, PART)
                    d_s += _epilogue(right, n + PART, tensors, rows, I, ACTIVATION, GATED, PART)
                else:
                    tl.static_assert(SUBTILES == 4, "SUBTILES is 1, 2 or 4")
                    q0, q1 = halves(left, BLOCK_M, BLOCK_N // 2)
                    q2, q3 = halves(right, BLOCK_M, BLOCK_N // 2)
                    d_s = _epilogue(q0, n, tensors, rows, I, ACTIVATION, GATED, PART)
                    d_s += _epilogue(q1, n + PART, tensors, rows, I, ACTIVATION, GATED, PART)
                    d_s += _epilogue(q2, n + 2 * PART, tensors, rows, I, ACTIVATION, GATED, PART)
                    d_s += _epilogue(q3, n + 3 * PART, tensors, rows, I, ACTIVATION, GATED, PART)
            tl.store(partial_ptr + i_n.to(tl.int64) * num_slots + slots, d_s, mask=m_m)


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
) -> tuple[Tensor, Tensor]:
    """Writes dH into ``dh_RN``, which may be ``h_RN`` itself; returns A' = s * A and dS."""
    rows, inner = h_RN.shape[0], w_down_EDI.shape[2]
    a_RI = h_RN.new_empty(rows, inner)
    if rows == 0:
        return a_RI, h_RN.new_zeros(weights_TK.shape, dtype=torch.float32)
    config = tiles("d_activation", capability(h_RN.device), h_RN.element_size(), block_m)
    d_out_TD = rows_contiguous(d_out_TD)
    num_m_tiles, num_n_tiles = tiles_2M.shape[1], cdiv(inner, config.block_n)
    # Zeros, because no tile covers a dropped slot.
    partial = h_RN.new_zeros((num_n_tiles, *weights_TK.shape), dtype=torch.float32)
    w_desc, transposed = matrix_descriptor(w_down_EDI.mT, config.block_n, config.block_k)
    launch(
        h_RN.device,
        Launch(
            d_activation_kernel,
            (min(config.per_sm * num_sms(h_RN.device), num_m_tiles * num_n_tiles),),
            {
                "d_out_ptr": d_out_TD,
                "w_desc": w_desc,
                "h_ptr": h_RN,
                "dh_ptr": dh_RN,
                "a_ptr": a_RI,
                "weights_ptr": weights_TK.contiguous(),
                "partial_ptr": partial,
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "tiles_ptr": tiles_2M,
                "num_m_tiles": num_m_tiles,
                "num_slots": rows,
                "stride_d_out": d_out_TD.stride(0),
                "D": d_out_TD.shape[1],
                "I": inner,
            },
            {
                "TOP_K": weights_TK.shape[1],
                "ACTIVATION": activation,
                "GATED": h_RN.shape[1] != inner,
                "N_MAJOR": not transposed,
                "EVEN_D": d_out_TD.shape[1] % config.block_k == 0,
                "PRECISION": input_precision(h_RN.dtype),
                "BLOCK_M": block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "SUBTILES": config.subtiles,
                "GROUP_M": config.group_m,
            },
            config.num_warps,
            config.num_stages,
            config.max_registers,
        ),
    )
    return a_RI, partial[0] if num_n_tiles == 1 else partial.sum(0)
