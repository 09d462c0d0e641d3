"""combine: launches ``csrc/combine.cu``, on copies of rows that can't be read 16 bytes at a time.

An ``out`` of such rows is written from a copy; fp64 weights are read as fp32.
"""

from torch import Tensor

from moe_kernels.backends.cuda._extension import address, aligned_rows, dtype_codes, launch


def combine(
    out_TD: Tensor, y_RD: Tensor, positions_TK: Tensor, weights_TK: Tensor | None, residual_TD: Tensor | None
) -> None:
    target_TD = aligned_rows(out_TD)
    y_RD = aligned_rows(y_RD)
    if weights_TK is not None:
        weights_TK = weights_TK.contiguous()
        if weights_TK.dtype not in dtype_codes():
            weights_TK = weights_TK.float()
    if residual_TD is not None:
        residual_TD = aligned_rows(residual_TD)

    launch(
        "combine",
        out_TD.device,
        out=address(target_TD),
        out_stride=target_TD.stride(0),
        y=address(y_RD),
        y_stride=y_RD.stride(0),
        positions=address(positions_TK),
        weights=address(weights_TK),
        weights_dtype=dtype_codes()[None if weights_TK is None else weights_TK.dtype],
        residual=address(residual_TD),
        residual_stride=0 if residual_TD is None else residual_TD.stride(0),
        tokens=out_TD.shape[0],
        top_k=positions_TK.shape[1],
        width=out_TD.shape[1],
        dtype=dtype_codes()[out_TD.dtype],
    )
    if target_TD is not out_TD:
        out_TD.copy_(target_TD)
