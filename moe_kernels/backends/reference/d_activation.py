import torch
from torch import Tensor

from moe_kernels.backends.reference._common import (
    accumulator,
    activate,
    activate_bwd,
    expert_ranges,
    without_autocast,
)


@without_autocast
def d_activation(
    dh_RN: Tensor,
    d_out_TD: Tensor,
    w_down_EDI: Tensor,
    h_RN: Tensor,
    weights_TK: Tensor,
    offsets_E1: Tensor,
    slots_R: Tensor,
    tiles_2M: Tensor,
    block_m: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Writes dH into ``dh_RN``, which may be ``h_RN`` itself; returns A' = s * A and dS."""
    acc = accumulator(d_out_TD.dtype)
    a_RI = h_RN.new_empty(h_RN.shape[0], w_down_EDI.shape[2])
    d_weights_TK = torch.zeros(weights_TK.shape, dtype=acc, device=h_RN.device)
    for expert, start, end in expert_ranges(offsets_E1):
        slots = slots_R[start:end]
        d_a = torch.mm(d_out_TD[slots // weights_TK.shape[1]], w_down_EDI[expert]).to(acc)
        h = h_RN[start:end].to(acc)
        a = activate(h, activation)
        s = weights_TK.reshape(-1)[slots, None].to(acc)
        d_weights_TK.view(-1)[slots] = (d_a * a).sum(-1)
        dh_RN[start:end] = activate_bwd(d_a * s, h, activation)
        a_RI[start:end] = a * s
    return a_RI, d_weights_TK
