"""grouped_gemm: y[r] = a[r] . W[e]^T (+ bias[e]) over the rows each expert owns.

``trans_w`` true: W is [E, N, C] as nn.Linear stores it, and y = a . W[e]^T. False: W is [E, C, N] and y = a . W[e].
C is the reduced width. Rows past offsets[E] are not written. W may be a slice along N: a product is made a few
columns at a time by passing that slice.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define
from moe_kernels.ops.gate_up import check_plan, traits


def _check(a_RC, w, bias_EN, offsets_E1, tiles_2M, block_m, trans_w):
    op = "grouped_gemm"
    c.check_matrix(op, "a", a_RC, 2, "[R, C]")
    c.check_matrix(op, "w", w, 3, "[E, N, C] with trans_w, else [E, C, N]")
    c.check_like(op, "w", w, a_RC, "a")
    c.check_size(op, "w", w, 2 if trans_w else 1, a_RC.shape[1], "C of a")
    if bias_EN is not None:
        c.check_like(op, "bias", bias_EN, a_RC, "a")
        if bias_EN.shape != (w.shape[0], w.shape[1 if trans_w else 2]):
            c.fail(op, "bias", bias_EN, f"of shape {[w.shape[0], w.shape[1 if trans_w else 2]]}")
    check_plan(op, a_RC, offsets_E1, tiles_2M, block_m, w.shape[0], a_RC.shape[0])


define(
    "grouped_gemm(Tensor a, Tensor w, Tensor? bias, Tensor offsets, Tensor tiles, int block_m, bool trans_w) -> Tensor",
    check=_check,
    fake=lambda a, w, bias, offsets, tiles, block_m, trans_w: a.new_empty(a.shape[0], w.shape[1 if trans_w else 2]),
    problem=lambda a, w, bias, o, t, block_m, trans_w: Problem(
        a.device, a.dtype, (w.shape[1], w.shape[2]), block_m, traits(w, bias=bias is not None)
    ),
)
