"""permute: copy token rows to expert order, out[r] = weights[slot] * x[slot // K] with slot = slots[r].

Without weights it is a plain copy. Rows past offsets[E] (dropped slots) are zero.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define


def _check(x_TD, weights_TK, offsets_E1, slots_R, top_k):
    op = "permute"
    c.check_matrix(op, "x", x_TD, 2, "[T, D]")
    c.check_offsets(op, offsets_E1, x_TD)
    c.check_index(op, "slots", slots_R, 1, "[R]", x_TD)
    c.check_size(op, "slots", slots_R, 0, x_TD.shape[0] * top_k, "R = T * top_k")
    c.check_weights(op, weights_TK, x_TD.shape[0], top_k, x_TD, "x")


define(
    "permute(Tensor x, Tensor? weights, Tensor offsets, Tensor slots, int top_k) -> Tensor",
    check=_check,
    fake=lambda x, weights, offsets, slots, top_k: x.new_empty(slots.shape[0], x.shape[1]),
    problem=lambda x, *_: Problem(x.device, x.dtype, (x.shape[1],)),
)
