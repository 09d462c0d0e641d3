"""grouped_gemm: launches ``csrc/grouped_gemm.cu``, on copies of rows that can't be read 16 bytes at a time."""

from torch import Tensor

from moe_kernels.backends.cuda._extension import address, aligned_rows, launch_sm90, plan_of, weights_of


def grouped_gemm(
    a_RC: Tensor, w: Tensor, bias_EN: Tensor | None, offsets_E1: Tensor, tiles_2M: Tensor, block_m: int, trans_w: bool
) -> Tensor:
    rows, reduced = a_RC.shape
    width = w.shape[1 if trans_w else 2]
    y_RN = a_RC.new_empty(rows, width)
    if rows == 0:
        return y_RN
    across = not trans_w
    if w.stride(2) != 1 and w.stride(1) == 1:  # stored the other way round: read as it lies
        w, across = w.mT, not across
    a_RC, w = aligned_rows(a_RC), aligned_rows(w)
    if bias_EN is not None:
        bias_EN = aligned_rows(bias_EN)
    launch_sm90(
        "grouped_gemm",
        a_RC.device,
        y=address(y_RN),
        a=address(a_RC),
        a_stride=a_RC.stride(0),
        w=weights_of(w),
        across=across,
        bias=address(bias_EN),
        bias_stride=0 if bias_EN is None else bias_EN.stride(0),
        width=width,
        reduced=reduced,
        plan=plan_of(offsets_E1, None, tiles_2M, rows, 1),
    )
    return y_RN
