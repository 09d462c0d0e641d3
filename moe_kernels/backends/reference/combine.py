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
    for k in range(positions_TK.shape[1]):
        positions = positions_TK[:, k]
        kept = positions >= 0
        row = y_RD[positions.clamp(min=0)].to(acc)
        if weights_TK is not None:
            row *= weights_TK[:, k, None].to(acc)
        total += torch.where(kept[:, None], row, 0)  # not a product with 0: an unwritten row may hold NaN
    out_TD.copy_(total)
