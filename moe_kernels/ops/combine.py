"""combine: out[t] = residual[t] + sum over k of weights[t, k] * y[positions[t, k]], fp32, k in ascending order.

Writes into ``out``, which may be a column slice of a wider tensor: that is how the [R, D] expert output is made and
consumed a few columns at a time. ``weights`` None means a plain sum, ``residual`` None means zero. Dropped slots
(position -1) add nothing.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define


def check_rows(op, y_RD, positions_TK, weights_TK):
    c.check_index(op, "positions", positions_TK, 2, "[T, K]", y_RD)
    c.check_size(op, "y", y_RD, 0, positions_TK.numel(), "R = T * K of positions")
    c.check_weights(op, weights_TK, *positions_TK.shape, y_RD, "y")


def _check(out_TD, y_RD, positions_TK, weights_TK, residual_TD):
    op = "combine"
    c.check_matrix(op, "out", out_TD, 2, "[T, D]")
    c.check_matrix(op, "y", y_RD, 2, "[R, D]")
    c.check_like(op, "y", y_RD, out_TD, "out")
    check_rows(op, y_RD, positions_TK, weights_TK)
    c.check_size(op, "out", out_TD, 0, positions_TK.shape[0], "T of positions")
    c.check_size(op, "out", out_TD, 1, y_RD.shape[1], "D of y")
    if residual_TD is not None:
        c.check_like(op, "residual", residual_TD, out_TD, "out")
        if residual_TD.shape != out_TD.shape:
            c.fail(op, "residual", residual_TD, f"shaped like out {list(out_TD.shape)}")


define(
    "combine(Tensor(a!) out, Tensor y, Tensor positions, Tensor? weights, Tensor? residual) -> ()",
    check=_check,
    fake=lambda *_: None,
    problem=lambda out, y, *_: Problem(y.device, y.dtype, (y.shape[1],)),
)
