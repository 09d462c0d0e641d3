"""unpermute: expert rows back to tokens, out[t] = sum over k of weights[t, k] * y[positions[t, k]], in fp32.

Without weights it is a plain sum. Dropped slots (position -1) add nothing. The same sum as ``combine``, in a
tensor of its own.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define
from moe_kernels.ops.combine import check_rows


def _check(y_RD, positions_TK, weights_TK):
    c.check_matrix("unpermute", "y", y_RD, 2, "[R, D]")
    check_rows("unpermute", y_RD, positions_TK, weights_TK)


define(
    "unpermute(Tensor y, Tensor positions, Tensor? weights) -> Tensor",
    check=_check,
    fake=lambda y, positions, weights: y.new_empty(positions.shape[0], y.shape[1]),
    problem=lambda y, *_: Problem(y.device, y.dtype, (y.shape[1],)),
)
