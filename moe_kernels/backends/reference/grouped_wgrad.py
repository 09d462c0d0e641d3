import torch
from torch import Tensor

from moe_kernels.backends.reference._common import accumulator, expert_ranges, without_autocast


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
) -> tuple[Tensor, Tensor]:
    experts, m, n = offsets_E1.shape[0] - 1, lhs.shape[1], rhs.shape[1]
    dw_EMN = lhs.new_zeros((experts, m, n), dtype=out_dtype)
    db_EM = lhs.new_zeros((experts if sum_lhs else 0, m), dtype=out_dtype)
    tokens_R = slots_R // max(top_k, 1)
    exact = torch.promote_types(lhs.dtype, out_dtype)  # an fp32 gradient of bf16 operands is not rounded to bf16
    for expert, start, end in expert_ranges(offsets_E1):
        rows = slice(start, end)
        left = lhs[tokens_R[rows]] if gather == "lhs" else lhs[rows]
        right = rhs[tokens_R[rows]] if gather == "rhs" else rhs[rows]
        dw_EMN[expert] = left.to(exact).T @ right.to(exact)
        if sum_lhs:
            db_EM[expert] = left.to(accumulator(lhs.dtype)).sum(0)
    return dw_EMN, db_EM
