"""combine: out[t] = residual[t] + sum over k of s[t, k] * y[positions[t, k]], in fp32, k ascending.

    y [R, D], positions [T, K], s [T, K], residual [T, D] -> out [T, D], which may be a column slice

Bandwidth-bound: R*D elements read once, T*D written. A program sums BLOCK_T tokens times BLOCK_D columns; the K row
loads don't depend on each other, so all are in flight at once. Row offsets are int64.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import Launch, cdiv, launch, rows_contiguous

_ELEMENTS = 2048  # a program's tile: 4 warps, 16 elements a thread
_COLUMNS = 256  # no wider than the narrowest column chunk, so that chunks of any width run the same program


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["weights_ptr"])
def combine_kernel(
    out_ptr,
    y_ptr,
    positions_ptr,
    weights_ptr,
    residual_ptr,
    T,
    D,
    stride_out,
    stride_y,
    stride_residual,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t = o_t < T
    mask = m_t[:, None] & (o_d < D)[None, :]
    if HAS_RESIDUAL:
        total = tl.load(residual_ptr + o_t[:, None] * stride_residual + o_d[None, :], mask=mask, other=0.0)
        total = total.to(tl.float32)
    else:
        total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(TOP_K):
        position = tl.load(positions_ptr + o_t * TOP_K + k, mask=m_t, other=-1).to(tl.int64)
        row = tl.load(
            y_ptr + position[:, None] * stride_y + o_d[None, :], mask=mask & (position >= 0)[:, None], other=0.0
        ).to(tl.float32)
        if HAS_WEIGHTS:
            s = tl.load(weights_ptr + o_t * TOP_K + k, mask=m_t, other=0.0).to(tl.float32)
            # A dropped slot's weight may be anything, its row is not read: 0 * NaN must not arise.
            total += tl.where(position >= 0, s, 0.0)[:, None] * row
        else:
            total += row
    tl.store(out_ptr + o_t[:, None] * stride_out + o_d[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(
    out_TD: Tensor, y_RD: Tensor, positions_TK: Tensor, weights_TK: Tensor | None, residual_TD: Tensor | None
) -> None:
    tokens, width = out_TD.shape
    if tokens == 0 or width == 0:
        return
    target_TD = out_TD if out_TD.stride(1) == 1 else out_TD.new_empty(out_TD.shape)
    y_RD = rows_contiguous(y_RD)
    residual = target_TD if residual_TD is None else rows_contiguous(residual_TD)
    block_d = min(_COLUMNS, triton.next_power_of_2(width))
    block_t = max(1, _ELEMENTS // block_d)
    launch(
        y_RD.device,
        Launch(
            combine_kernel,
            (cdiv(tokens, block_t), cdiv(width, block_d)),
            {
                "out_ptr": target_TD,
                "y_ptr": y_RD,
                "positions_ptr": positions_TK,
                "weights_ptr": target_TD if weights_TK is None else weights_TK.contiguous(),
                "residual_ptr": residual,
                "T": tokens,
                "D": width,
                "stride_out": target_TD.stride(0),
                "stride_y": y_RD.stride(0),
                "stride_residual": residual.stride(0),
            },
            {
                "TOP_K": positions_TK.shape[1],
                "HAS_WEIGHTS": weights_TK is not None,
                "HAS_RESIDUAL": residual_TD is not None,
                "BLOCK_T": block_t,
                "BLOCK_D": block_d,
            },
            4,
            1,
        ),
    )
    if target_TD is not out_TD:
        out_TD.copy_(target_TD)
