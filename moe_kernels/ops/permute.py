"""permute: copy token rows to expert order, out[r] = weights[slot] * x[slot // K] with slot = slots[r].

The same by tokens: out[positions[t, k]] = weights[t, k] * x[t]; a backend takes what suits it. Without weights it is a
plain copy. Rows past offsets[E] (dropped slots, position -1) are zero.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define


def _check(x_TD, weights_TK, offsets_E1, slots_R, positions_TK):
    op = "permute"
    c.check_matrix(op, "x", x_TD, 2, "[T, D]")
    c.check_offsets(op, offsets_E1, x_TD)
    c.check_index(op, "positions", positions_TK, 2, "[T, K]", x_TD)
    c.check_size(op, "positions", positions_TK, 0, x_TD.shape[0], "T of x")
    c.check_index(op, "slots", slots_R, 1, "[R]", x_TD)
    c.check_size(op, "slots", slots_R, 0, positions_TK.numel(), "R = T * K of positions")
    c.check_weights(op, weights_TK, *positions_TK.shape, x_TD, "x")


define(
    "permute(Tensor x, Tensor? weights, Tensor offsets, Tensor slots, Tensor positions) -> Tensor",
    check=_check,
    fake=lambda x, weights, offsets, slots, positions: x.new_empty(slots.shape[0], x.shape[1]),
    problem=lambda x, *_: Problem(x.device, x.dtype, (x.shape[1],)),
)
