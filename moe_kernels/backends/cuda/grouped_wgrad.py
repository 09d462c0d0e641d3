"""grouped_wgrad: launches ``csrc/grouped_wgrad.cu``, and ``csrc/row_sums.cu`` for the sums of lhs.

Rows that can't be read 16 bytes at a time are copied; what is added to an ``into`` that can't be written so is made
apart first.
"""

import torch
from torch import Tensor

from moe_kernels.backends.cuda._extension import (
    address,
    aligned_rows,
    dtype_codes,
    launch,
    launch_sm90,
    plan_of,
    row_sums_workspace,
)


def grouped_wgrad(
    lhs: Tensor,
    rhs: Tensor,
    offsets_E1: Tensor,
    slots_R: Tensor,
    top_k: int,
    gather: str,
    sum_lhs: bool,
    out_dtype: torch.dtype,
    into_EMN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    experts, m, n, rows = offsets_E1.shape[0] - 1, lhs.shape[1], rhs.shape[1], slots_R.shape[0]
    make = lhs.new_empty if rows else lhs.new_zeros
    if into_EMN is not None and into_EMN.data_ptr() % 16:  # a slice of a flat buffer: the copy engine can't write there
        dw_EMN, db_EM = grouped_wgrad(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype)
        return into_EMN.add_(dw_EMN), db_EM
    dw_EMN = make((experts, m, n), dtype=out_dtype) if into_EMN is None else into_EMN
    db_EM = make((experts if sum_lhs else 0, m), dtype=out_dtype)
    if rows == 0:
        return dw_EMN, db_EM

    def plan(gathers: bool):
        return plan_of(offsets_E1, slots_R, None, rows, top_k) if gathers else plan_of(offsets_E1, None, None, rows, 1)

    lhs = aligned_rows(lhs)
    if n:
        rhs = aligned_rows(rhs)
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
            accumulate=into_EMN is not None,
            plan=plan(gather != "none"),
        )
    if sum_lhs:
        workspace = lhs.new_empty(row_sums_workspace(rows, experts, m), dtype=torch.float32)
        launch(
            "row_sums",
            lhs.device,
            sums=address(db_EM),
            sums_dtype=dtype_codes()[out_dtype],
            rows=address(lhs),
            row_stride=lhs.stride(0),
            width=m,
            workspace=address(workspace),
            plan=plan(gather == "lhs"),
        )
    return dw_EMN, db_EM
