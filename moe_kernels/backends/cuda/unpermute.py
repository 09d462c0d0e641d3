"""unpermute: the sum of ``combine``, in a tensor of its own."""

from torch import Tensor

from moe_kernels.backends.cuda.combine import combine


def unpermute(y_RD: Tensor, positions_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    out_TD = y_RD.new_empty(positions_TK.shape[0], y_RD.shape[1])
    combine(out_TD, y_RD, positions_TK, weights_TK, None)
    return out_TD
