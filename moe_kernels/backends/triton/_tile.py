"""Pieces that several kernels share: the order of tiles, a weight tile in either storage order, row loads and stores.

Row tensors that a kernel writes are seen as [R, parts, width] (H has a gate and an up part), so that a box never runs
from one part into the next.
"""

import triton
import triton.language as tl


@triton.jit
def tile_position(tile, num_m_tiles, num_n_tiles, GROUP_M: tl.constexpr):
    """Walk GROUP_M row tiles down before the next column tile, so that a wave of programs shares weights in L2."""
    per_group = GROUP_M * num_n_tiles
    group = tile // per_group
    first_m = group * GROUP_M
    group_m = tl.minimum(num_m_tiles - first_m, GROUP_M)
    within = tile % per_group
    return first_m + within % group_m, within // group_m


@triton.jit
def weight_tile(w_desc, expert, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, N_MAJOR: tl.constexpr):
    """The [BLOCK_K, BLOCK_N] tile of expert's matrix; N_MAJOR: stored [N, K], as nn.Linear does."""
    if N_MAJOR:
        return w_desc.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
    return w_desc.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)


@triton.jit
def load_columns(p_rows, columns, width, EVEN: tl.constexpr):
    """Columns of the rows at p_rows [rows, 1]; zeros past the width, which EVEN rules out."""
    if EVEN:
        return tl.load(p_rows + columns[None, :])
    return tl.load(p_rows + columns[None, :], mask=(columns < width)[None, :], other=0.0)


@triton.jit
def store_rows(
    desc, ptr, value, first, end, part, n, PARTS: tl.constexpr, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write a tile: by the copy engine, straight from the accumulator's layout, when all its rows are the expert's;
    the expert's last, ragged tile by masked stores, since a box would cover the next expert's rows."""
    value = value.to(ptr.dtype.element_ty)
    if first + ROWS <= end:
        desc.store([first, part, n], value.reshape(ROWS, 1, COLUMNS))
    else:
        o_m = first + tl.arange(0, ROWS)
        o_n = n + tl.arange(0, COLUMNS)
        p = ptr + o_m.to(tl.int64)[:, None] * (PARTS * width) + part * width + o_n[None, :]
        tl.store(p, value, mask=(o_m < end)[:, None] & (o_n < width)[None, :])
