import torch
from torch import Tensor

from moe_kernels.backends.cuda._extension import address, aligned_rows, dtype_codes, launch_sm90, plan_of


def grouped_wgrad(
    lhs: Tensor,
    rhs: Tensor,
    offsets_E1: Tensor,
    slots_R: Tensor,
    top_k: int,
    gather: str,
    sum_lhs: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    experts, m, n = offsets_E1.shape[0] - 1, lhs.shape[1], rhs.shape[1]
    nothing = lhs.new_empty((0, m), dtype=out_dtype)
    if slots_R.shape[0] == 0:
        return lhs.new_zeros((experts, m, n), dtype=out_dtype), nothing
    dw_EMN = lhs.new_empty((experts, m, n), dtype=out_dtype)
    lhs, rhs = aligned_rows(lhs), aligned_rows(rhs)
    launch_sm90(
        "grouped_wgrad",
        lhs.device,
        dw=address(dw_EMN),
        dw_dtype=dtype_codes()[out_dtype],
        lhs=address(lhs),
        lhs_stride=lhs.stride(0),
        rhs=address(rhs),
        rhs_stride=rhs.stride(0),
        m=m,
        n=n,
        gather_lhs=gather == "lhs",
        plan=plan_of(offsets_E1, slots_R, None, slots_R.shape[0], top_k),
    )
    return dw_EMN, nothing
