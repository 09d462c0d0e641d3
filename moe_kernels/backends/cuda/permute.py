"""permute: launches ``csrc/permute.cu``, on a copy of rows that can't be read 16 bytes at a time.

fp64 weights are read as fp32.
"""

from torch import Tensor

from moe_kernels.backends.cuda._extension import address, aligned_rows, dtype_codes, launch


def permute(
    x_TD: Tensor, weights_TK: Tensor | None, offsets_E1: Tensor, slots_R: Tensor, positions_TK: Tensor
) -> Tensor:
    out_RD = x_TD.new_empty(slots_R.shape[0], x_TD.shape[1])
    x_TD = aligned_rows(x_TD)
    if weights_TK is not None:
        weights_TK = weights_TK.contiguous()
        if weights_TK.dtype not in dtype_codes():
            weights_TK = weights_TK.float()
    launch(
        "permute",
        x_TD.device,
        out=address(out_RD),
        x=address(x_TD),
        x_stride=x_TD.stride(0),
        weights=address(weights_TK),
        weights_dtype=dtype_codes()[None if weights_TK is None else weights_TK.dtype],
        offsets=address(offsets_E1),
        positions=address(positions_TK),
        tokens=x_TD.shape[0],
        top_k=positions_TK.shape[1],
        width=x_TD.shape[1],
        num_experts=offsets_E1.shape[0] - 1,
        dtype=dtype_codes()[x_TD.dtype],
    )
    return out_RD
