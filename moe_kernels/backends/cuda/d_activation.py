"""d_activation: launches ``csrc/d_activation.cu``, on copies of rows that can't be read 16 bytes at a time.

A dH over an H that was copied is copied back. The partial sums of dS, one for each tile of columns, are added up
here; fp64 routing weights are read as fp32.
"""

import torch
from torch import Tensor

from moe_kernels.backends.cuda._extension import (
    activation_arguments,
    address,
    aligned_rows,
    dtype_codes,
    launch_sm90,
    plan_of,
    tile_columns,
    weights_of,
)


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
    rows, inner = h_RN.shape[0], w_down_EDI.shape[2]
    a_RI = h_RN.new_empty(rows, inner)
    # A partial sum of dS for each tile of columns. Zeros: no row writes the slot of a dropped pair.
    partial = h_RN.new_zeros((-(-inner // tile_columns()), *weights_TK.shape), dtype=torch.float32)
    if rows == 0:
        return a_RI, partial[0]
    along = w_down_EDI.stride(2) != 1
    d_out_TD, w = aligned_rows(d_out_TD), aligned_rows(w_down_EDI.mT if along else w_down_EDI)
    weights_TK = weights_TK.contiguous()
    if weights_TK.dtype not in dtype_codes():
        weights_TK = weights_TK.float()
    source_RN = aligned_rows(h_RN)
    target_RN = source_RN if dh_RN is h_RN else dh_RN
    launch_sm90(
        "d_activation",
        h_RN.device,
        dh=address(target_RN),
        a=address(a_RI),
        partial=address(partial),
        h=address(source_RN),
        d_out=address(d_out_TD),
        d_out_stride=d_out_TD.stride(0),
        w=weights_of(w),
        along=along,
        weights=address(weights_TK),
        weights_dtype=dtype_codes()[weights_TK.dtype],
        inner=inner,
        reduced=d_out_TD.shape[1],
        **activation_arguments(activation, alpha, limit, interleaved),
        plan=plan_of(offsets_E1, slots_R, tiles_2M, rows, weights_TK.shape[1]),
    )
    if target_RN is not dh_RN:
        dh_RN.copy_(target_RN)
    return a_RI, partial[0] if partial.shape[0] == 1 else partial.sum(0)
