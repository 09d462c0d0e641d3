import torch
from torch import Tensor

from moe_kernels.backends.reference._common import expert_ranges, without_autocast


@without_autocast
def grouped_gemm(
    a_RC: Tensor, w: Tensor, bias_EN: Tensor | None, offsets_E1: Tensor, tiles_2M: Tensor, block_m: int, trans_w: bool
) -> Tensor:
    w_ECN = w.mT if trans_w else w
    y_RN = a_RC.new_empty(a_RC.shape[0], w_ECN.shape[2])
    for expert, start, end in expert_ranges(offsets_E1):
        torch.mm(a_RC[start:end], w_ECN[expert], out=y_RN[start:end])
        if bias_EN is not None:
            y_RN[start:end] += bias_EN[expert]
    return y_RN
