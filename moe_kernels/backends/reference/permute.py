from torch import Tensor

from moe_kernels.backends.reference._common import accumulator


def permute(
    x_TD: Tensor, weights_TK: Tensor | None, offsets_E1: Tensor, slots_R: Tensor, positions_TK: Tensor
) -> Tensor:
    top_k = positions_TK.shape[1]
    kept = int(offsets_E1[-1])
    out_RD = x_TD.new_zeros(slots_R.shape[0], x_TD.shape[1])
    slots = slots_R[:kept]
    rows = x_TD.index_select(0, slots // top_k) if top_k else x_TD
    if weights_TK is not None:
        acc = accumulator(x_TD.dtype)
        rows = rows.to(acc) * weights_TK.reshape(-1)[slots, None].to(acc)
    out_RD[:kept] = rows
    return out_RD
