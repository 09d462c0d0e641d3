import torch
from torch import Tensor

from moe_kernels.backends.reference._common import (
    accumulator,
    activate,
    activate_bwd_,
    parts,
    product_per_expert,
    rows_per_expert,
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
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Writes dH into ``dh_RN``, which may be ``h_RN`` itself; returns A' = s * A and dS."""
    how = activation, alpha, limit, interleaved
    acc = accumulator(d_out_TD.dtype)
    counts = rows_per_expert(offsets_E1)
    kept = sum(counts)
    slots = slots_R[:kept]
    a_RI = h_RN.new_empty(h_RN.shape[0], w_down_EDI.shape[2])
    d_weights_TK = torch.zeros(weights_TK.shape, dtype=acc, device=h_RN.device)

    # A' is written after all that needs dA', whose memory it takes.
    product_per_expert(d_out_TD.index_select(0, slots // max(weights_TK.shape[1], 1)), w_down_EDI, a_RI, counts)
    s_R1 = weights_TK.reshape(-1)[slots, None].to(acc)
    for part in parts(kept):
        d_a, h, s = a_RI[part].to(acc), h_RN[part].to(acc), s_R1[part]
        a = activate(h, *how)
        d_weights_TK.view(-1)[slots[part]] = (d_a * a).sum(-1)
        activate_bwd_(dh_RN[part], d_a.mul_(s), h, *how)
        a_RI[part] = a.mul_(s)
    return a_RI, d_weights_TK
