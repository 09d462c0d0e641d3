"""gate_up: H[r] = x[token(r)] . W[e]^T (+ bias[e]), A[r] = act(H[r]); the rows are gathered as they are loaded.

    x [T, D] · W [E, N, D] -> H [R, N], A [R, I]; gated N = 2I (gate rows, then up rows), else N = I

Tiling: a program makes BLOCK_M rows of one expert times BLOCK_N columns of A. Gated, it holds two accumulators, the
gate columns and the up columns I further on, so that the activation never leaves its registers. Where gate and up are
interleaved the second continues the first, and a thread has the gate and the up of a pair side by side. Rows of x come
by pointer loads through slots (Hopper's copy engine has no row gather), W by tensor descriptors. Persistent grid; the
plan's tile map says which rows and which expert a tile is. Row offsets are int64: R * N passes 2^31.
Without an activation H is the bare product of gathered rows, which d_activation asks for.
Idea of fusing gather and activation: SonicMoE (arXiv 2512.14080), ScatterMoE (arXiv 2403.08245).
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._activation import GATED, gated_activation, plain_activation
from moe_kernels.backends.triton._launch import (
    Launch,
    capability,
    cdiv,
    input_precision,
    launch,
    matrix_descriptor,
    num_sms,
    parts_descriptor,
    rows_contiguous,
)
from moe_kernels.backends.triton._tile import load_columns, store_rows, tile_position, weight_tile
from moe_kernels.backends.triton.configs import tiles


@triton.jit(do_not_specialize=["num_m_tiles"])
def gate_up_kernel(
    x_ptr,
    w_desc,
    bias_ptr,
    h_desc,
    h_ptr,
    a_desc,
    a_ptr,
    offsets_ptr,
    slots_ptr,
    tiles_ptr,
    num_m_tiles,
    stride_x,
    D,
    I,  # noqa: E741
    alpha,
    limit,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_n_tiles = tl.cdiv(I, BLOCK_N)
    PARTS: tl.constexpr = 2 if GATED and not INTERLEAVED else 1  # of H
    width = 2 * I if INTERLEAVED else I  # of one
    # Columns of H: those of a tile's first accumulator start at n, those of its second this much further on.
    STEP: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    second = BLOCK_N if INTERLEAVED else I
    for tile in range(tl.program_id(0), num_m_tiles * num_n_tiles, tl.num_programs(0)):
        i_m, i_n = tile_position(tile, num_m_tiles, num_n_tiles, GROUP_M)
        expert = tl.load(tiles_ptr + i_m)
        if expert >= 0:
            first = tl.load(tiles_ptr + num_m_tiles + i_m)
            end = tl.load(offsets_ptr + expert + 1)
            o_m = first + tl.arange(0, BLOCK_M)
            # Rows past the expert's end repeat its last row: a clamped load needs no mask, the store has one.
            slots = tl.load(slots_ptr + tl.minimum(o_m, end - 1))
            p_x = x_ptr + (slots // TOP_K).to(tl.int64)[:, None] * stride_x
            o_k = tl.arange(0, BLOCK_K)
            n = i_n * STEP

            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # interleaved: both of the left pairs
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # and both of the right ones
            for k in range(0, D, BLOCK_K):
                x = load_columns(p_x, k + o_k, D, EVEN_D)
                w_gate = weight_tile(w_desc, expert, n, k, BLOCK_N, BLOCK_K, N_MAJOR)
                gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
                if GATED:
                    w_up = weight_tile(w_desc, expert, second + n, k, BLOCK_N, BLOCK_K, N_MAJOR)
                    up = tl.dot(x, w_up, up, input_precision=PRECISION)

            if HAS_BIAS:
                o_n = n + tl.arange(0, BLOCK_N)
                p_bias = bias_ptr + expert.to(tl.int64) * (PARTS * width) + o_n
                gate += tl.load(p_bias, mask=o_n < width, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    o_second = o_n + BLOCK_N if INTERLEAVED else o_n
                    up += tl.load(p_bias + second, mask=o_second < width, other=0.0).to(tl.float32)[None, :]
            if STORE_H:
                store_rows(h_desc, h_ptr, gate, first, end, 0, n, PARTS, width, BLOCK_M, BLOCK_N)
                if INTERLEAVED:
                    store_rows(h_desc, h_ptr, up, first, end, 0, n + BLOCK_N, PARTS, width, BLOCK_M, BLOCK_N)
                elif GATED:
                    store_rows(h_desc, h_ptr, up, first, end, 1, n, PARTS, width, BLOCK_M, BLOCK_N)
            if STORE_A:
                if INTERLEAVED:
                    g, u = tl.split(gate.reshape(BLOCK_M, BLOCK_N // 2, 2))
                    left, _, _ = gated_activation(g, u, alpha, limit, ACTIVATION)
                    g, u = tl.split(up.reshape(BLOCK_M, BLOCK_N // 2, 2))
                    right, _, _ = gated_activation(g, u, alpha, limit, ACTIVATION)
                    a = tl.join(left, right).trans(0, 2, 1).reshape(BLOCK_M, BLOCK_N)
                elif GATED:
                    a, _, _ = gated_activation(gate, up, alpha, limit, ACTIVATION)
                else:
                    a, _ = plain_activation(gate, ACTIVATION)
                store_rows(a_desc, a_ptr, a, first, end, 0, i_n * BLOCK_N, 1, I, BLOCK_M, BLOCK_N)


def gate_up(
    x_TD: Tensor,
    w_END: Tensor,
    bias_EN: Tensor | None,
    offsets_E1: Tensor,
    slots_R: Tensor,
    tiles_2M: Tensor,
    block_m: int,
    top_k: int,
    activation: str,
    store_h: bool,
    store_a: bool,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    rows, n = slots_R.shape[0], w_END.shape[1]
    h_RN = x_TD.new_empty(rows if store_h else 0, n)
    a_RI = x_TD.new_empty(rows if store_a else 0, n // 2 if activation in GATED else n)
    if rows:
        h, a = h_RN if store_h else None, a_RI if store_a else None
        plan = (offsets_E1, slots_R, tiles_2M, block_m, top_k)
        launch_gathered("gate_up", x_TD, w_END, bias_EN, h, a, *plan, activation, alpha, limit, interleaved)
    return h_RN, a_RI


def launch_gathered(
    op: str,
    x_TD: Tensor,
    w_END: Tensor,
    bias_EN: Tensor | None,
    h_RN: Tensor | None,
    a_RI: Tensor | None,
    offsets_E1: Tensor,
    slots_R: Tensor,
    tiles_2M: Tensor,
    block_m: int,
    top_k: int,
    activation: str | None,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> None:
    """Writes H, A or both, with the tiles of ``op``."""
    gated = activation in GATED
    inner = w_END.shape[1] // 2 if gated else w_END.shape[1]
    parts = 2 if gated and not interleaved else 1
    config = tiles(op, capability(x_TD.device), x_TD.element_size(), block_m)
    x_TD = rows_contiguous(x_TD)
    w_desc, transposed = matrix_descriptor(w_END, config.block_n, config.block_k)
    num_m_tiles = tiles_2M.shape[1]
    store_h, store_a = h_RN is not None, a_RI is not None
    launch(
        x_TD.device,
        Launch(
            gate_up_kernel,
            (min(config.per_sm * num_sms(x_TD.device), num_m_tiles * cdiv(inner, config.block_n)),),
            {
                "x_ptr": x_TD,
                "w_desc": w_desc,
                "bias_ptr": x_TD if bias_EN is None else bias_EN.contiguous(),
                "h_desc": parts_descriptor(h_RN, parts, block_m, config.block_n) if store_h else None,
                "h_ptr": h_RN if store_h else x_TD,
                "a_desc": parts_descriptor(a_RI, 1, block_m, config.block_n) if store_a else None,
                "a_ptr": a_RI if store_a else x_TD,
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "tiles_ptr": tiles_2M,
                "num_m_tiles": num_m_tiles,
                "stride_x": x_TD.stride(0),
                "D": x_TD.shape[1],
                "I": inner,
                "alpha": alpha or 0.0,
                "limit": limit or 0.0,
            },
            {
                "TOP_K": top_k,
                "ACTIVATION": activation,
                "GATED": gated,
                "INTERLEAVED": interleaved,
                "STORE_H": store_h,
                "STORE_A": store_a,
                "HAS_BIAS": bias_EN is not None,
                "N_MAJOR": not transposed,
                "EVEN_D": x_TD.shape[1] % config.block_k == 0,
                "PRECISION": input_precision(x_TD.dtype),
                "BLOCK_M": block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config.num_warps,
            config.num_stages,
        ),
    )
