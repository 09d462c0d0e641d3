import torch
from torch import Tensor

from moe_kernels.backends.reference._common import accumulator


def combine(
    out_TD: Tensor, y_RD: Tensor, positions_TK: Tensor, weights_TK: Tensor | None, residual_TD: Tensor | None
) -> None:
    acc = accumulator(y_RD.dtype)
    total = torch.zeros(out_TD.shape, dtype=acc, device=y_RD.device)
    if residual_TD is not None:
        total += residual_TD
    dropped_TK = positions_TK < 0
    some_dropped = bool(dropped_TK.any())
    for k, positions in enumerate(positions_TK.clamp(min=0).unbind(1)):
        row = y_RD.index_select(0, positions).to(acc)
        weight = None if weights_TK is None else weights_TK[:, k, None].to(acc)
        if some_dropped:  # not a product with 0: an unwritten row, or its weight, may hold NaN
            row = row.masked_fill(dropped_TK[:, k, None], 0)
            weight = None if weight is None else weight.masked_fill(dropped_TK[:, k, None], 0)
        if weight is None:
            total += row
        else:
            total.addcmul_(row, weight)
    out_TD.copy_(total)
