import torch
from torch import Tensor

from moe_kernels.backends.reference._common import accumulator, activate, expert_ranges, without_autocast


@without_autocast
def gate_up(
    x_TD: Tensor,
    w_END: Tensor,
    bias_EN: Tensor | None,
    offsets_E1: Tensor,
    slots_R: Tensor,
    tiles_2M: Tensor,
    block_m: int,
    top_k: int,
    activation: str,
    store_h: bool,
    store_a: bool,
) -> tuple[Tensor, Tensor]:
    h_RN = x_TD.new_empty(slots_R.shape[0], w_END.shape[1])
    tokens_R = slots_R // max(top_k, 1)
    kept = 0
    for expert, start, end in expert_ranges(offsets_E1):
        torch.mm(x_TD[tokens_R[start:end]], w_END[expert].T, out=h_RN[start:end])
        if bias_EN is not None:
            h_RN[start:end] += bias_EN[expert]
        kept = end
    a_RI = x_TD.new_empty(0, w_END.shape[1])
    if store_a:
        a = activate(h_RN[:kept].to(accumulator(x_TD.dtype)), activation)
        a_RI = x_TD.new_empty(h_RN.shape[0], a.shape[1])
        a_RI[:kept] = a
    return h_RN if store_h else h_RN[:0], a_RI
