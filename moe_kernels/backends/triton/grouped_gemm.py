"""grouped_gemm: y[r] = a[r] . W[e] over the rows each expert owns, W in either orientation.

    a [R, C] · W [E, N, C]^T or [E, C, N] -> y [R, N]

Tiling: a program makes BLOCK_M rows of one expert times BLOCK_N columns. Both operands come by tensor descriptors. A
tile's box may run into the next expert's rows: those are computed and not stored. Persistent grid over the plan's
tile map; row offsets are int64.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import (
    Launch,
    capability,
    cdiv,
    input_precision,
    launch,
    matrix_descriptor,
    num_sms,
    parts_descriptor,
    row_descriptor,
)
from moe_kernels.backends.triton._tile import store_rows, tile_position, weight_tile
from moe_kernels.backends.triton.configs import tiles


@triton.jit(do_not_specialize=["num_m_tiles"])
def grouped_gemm_kernel(
    a_desc,
    w_desc,
    bias_ptr,
    y_desc,
    y_ptr,
    offsets_ptr,
    tiles_ptr,
    num_m_tiles,
    stride_bias,
    C,
    N,
    HAS_BIAS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_m_tiles * num_n_tiles, tl.num_programs(0)):
        i_m, i_n = tile_position(tile, num_m_tiles, num_n_tiles, GROUP_M)
        expert = tl.load(tiles_ptr + i_m)
        if expert >= 0:
            first = tl.load(tiles_ptr + num_m_tiles + i_m)
            end = tl.load(offsets_ptr + expert + 1)
            n = i_n * BLOCK_N

            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, C, BLOCK_K):
                a = a_desc.load([first, k])
                w = weight_tile(w_desc, expert, n, k, BLOCK_N, BLOCK_K, N_MAJOR)
                acc = tl.dot(a, w, acc, input_precision=PRECISION)

            if HAS_BIAS:
                o_n = n + tl.arange(0, BLOCK_N)
                p_bias = bias_ptr + expert.to(tl.int64) * stride_bias + o_n
                acc += tl.load(p_bias, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
            store_rows(y_desc, y_ptr, acc, first, end, 0, n, 1, N, BLOCK_M, BLOCK_N)


def grouped_gemm(
    a_RC: Tensor, w: Tensor, bias_EN: Tensor | None, offsets_E1: Tensor, tiles_2M: Tensor, block_m: int, trans_w: bool
) -> Tensor:
    rows, reduced = a_RC.shape
    n = w.shape[1 if trans_w else 2]
    y_RN = a_RC.new_empty(rows, n)
    if rows == 0:
        return y_RN
    config = tiles("grouped_gemm", capability(a_RC.device), a_RC.element_size(), block_m)
    w_desc, transposed = matrix_descriptor(w if trans_w else w.mT, config.block_n, config.block_k)
    bias_EN = y_RN if bias_EN is None else bias_EN if bias_EN.stride(1) == 1 else bias_EN.contiguous()
    num_m_tiles = tiles_2M.shape[1]
    launch(
        a_RC.device,
        Launch(
            grouped_gemm_kernel,
            (min(config.per_sm * num_sms(a_RC.device), num_m_tiles * cdiv(n, config.block_n)),),
            {
                "a_desc": row_descriptor(a_RC, block_m, config.block_k),
                "w_desc": w_desc,
                "bias_ptr": bias_EN,
                "y_desc": parts_descriptor(y_RN, 1, block_m, config.block_n),
                "y_ptr": y_RN,
                "offsets_ptr": offsets_E1,
                "tiles_ptr": tiles_2M,
                "num_m_tiles": num_m_tiles,
                "stride_bias": bias_EN.stride(0),
                "C": reduced,
                "N": n,
            },
            {
                "HAS_BIAS": bias_EN is not y_RN,
                "N_MAJOR": not transposed,
                "PRECISION": input_precision(a_RC.dtype),
                "BLOCK_M": block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config.num_warps,
            config.num_stages,
        ),
    )
    return y_RN
