from torch import Tensor

from moe_kernels.backends.reference._common import product_per_expert, rows_per_expert, without_autocast


@without_autocast
def grouped_gemm(
    a_RC: Tensor, w: Tensor, bias_EN: Tensor | None, offsets_E1: Tensor, tiles_2M: Tensor, block_m: int, trans_w: bool
) -> Tensor:
    w_ECN = w.mT if trans_w else w
    counts = rows_per_expert(offsets_E1)
    y_RN = a_RC.new_empty(a_RC.shape[0], w_ECN.shape[2])
    product_per_expert(a_RC, w_ECN, y_RN, counts)
    if bias_EN is not None:
        kept = sum(counts)
        y_RN[:kept] += bias_EN.repeat_interleave(offsets_E1.diff(), 0, output_size=kept)
    return y_RN
