import torch
from torch import Tensor

from moe_kernels.backends.reference._common import accumulator, rows_per_expert, without_autocast


@without_autocast
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
    counts = rows_per_expert(offsets_E1)
    tokens_R = slots_R[: sum(counts)] // max(top_k, 1)
    left = lhs.index_select(0, tokens_R) if gather == "lhs" else lhs[: sum(counts)]
    right = rhs.index_select(0, tokens_R) if gather == "rhs" else rhs[: sum(counts)]
    exact = torch.promote_types(lhs.dtype, out_dtype)  # an fp32 gradient of bf16 operands is not rounded to bf16
    dw_EMN = lhs.new_empty((len(counts), lhs.shape[1], rhs.shape[1]), dtype=exact)
    for a, b, dw in zip(left.to(exact).split(counts), right.to(exact).split(counts), dw_EMN.unbind()):
        torch.mm(a.T, b, out=dw)  # writes zeros for an expert without rows
    db_EM = lhs.new_empty((len(counts) if sum_lhs else 0, lhs.shape[1]), dtype=out_dtype)
    if sum_lhs:
        for a, db in zip(left.to(accumulator(lhs.dtype)).split(counts), db_EM.unbind()):
            db.copy_(a.sum(0))
    dw_EMN = dw_EMN.to(out_dtype)
    return dw_EMN if into_EMN is None else into_EMN.add_(dw_EMN), db_EM
