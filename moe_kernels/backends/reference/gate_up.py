from torch import Tensor

from moe_kernels.backends.reference._common import (
    accumulator,
    activate,
    parts,
    product_per_expert,
    rows_per_expert,
    without_autocast,
)


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
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    counts = rows_per_expert(offsets_E1)
    kept = sum(counts)
    h_RN = x_TD.new_empty(slots_R.shape[0], w_END.shape[1])
    product_per_expert(x_TD.index_select(0, slots_R[:kept] // max(top_k, 1)), w_END.mT, h_RN, counts)
    if bias_EN is not None:
        h_RN[:kept] += bias_EN.repeat_interleave(offsets_E1.diff(), 0, output_size=kept)
    how = activation, alpha, limit, interleaved
    a_RI = activate(h_RN[:0], *how)
    if store_a:
        a_RI = x_TD.new_empty(h_RN.shape[0], a_RI.shape[1])
        for part in parts(kept):
            a_RI[part] = activate(h_RN[part].to(accumulator(x_TD.dtype)), *how)
    return h_RN if store_h else h_RN[:0], a_RI
