"""grouped_wgrad: dW[e] = sum over the rows r of expert e of lhs(r)^T . rhs(r), and optionally db[e] = sum of lhs(r).

At most one side is gathered: ``gather`` "lhs" or "rhs" reads row slots[r] // top_k of that tensor ([T, .]), "none"
reads row r of both ([R, .]). ``rhs`` of width 0: only the sums are wanted. Experts without rows get zeros. Products and
sums accumulate in fp32 in a fixed order and are rounded once to ``out_dtype``.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define

GATHERS = ("none", "lhs", "rhs")


def _check(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype):
    op = "grouped_wgrad"
    if gather not in GATHERS:
        c.fail(op, "gather", gather, "one of " + ", ".join(GATHERS))
    c.check_matrix(op, "lhs", lhs, 2, "[rows, M]")
    c.check_matrix(op, "rhs", rhs, 2, "[rows, N]")
    c.check_like(op, "rhs", rhs, lhs, "lhs")
    c.check_offsets(op, offsets_E1, lhs)
    c.check_index(op, "slots", slots_R, 1, "[R]", lhs)
    for name, side in (("lhs", lhs), ("rhs", rhs)):
        if gather == name and side.shape[0] * top_k != slots_R.shape[0]:
            c.fail(op, name, side, f"of {slots_R.shape[0] // max(top_k, 1)} rows (T = R / top_k), it is gathered")
        if gather != name and side.shape[0] != slots_R.shape[0]:
            c.fail(op, name, side, f"of {slots_R.shape[0]} rows (R of slots), it is not gathered")
    if out_dtype not in c.FLOATS:
        c.fail(op, "out_dtype", out_dtype, "a floating dtype")


def _fake(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype):
    experts, m = offsets_E1.shape[0] - 1, lhs.shape[1]
    return (
        lhs.new_empty((experts, m, rhs.shape[1]), dtype=out_dtype),
        lhs.new_empty((experts, m) if sum_lhs else (0, m), dtype=out_dtype),
    )


def _problem(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype):
    result = str(out_dtype).removeprefix("torch.")
    asked = {"gather none": gather == "none", "row sums": sum_lhs, f"{result} result": out_dtype != lhs.dtype}
    traits = tuple(name for name, is_asked in asked.items() if is_asked)
    m, n = lhs.shape[1], rhs.shape[1]
    return Problem(lhs.device, lhs.dtype, (m, n) if n else (m,), traits=traits)


define(
    "grouped_wgrad(Tensor lhs, Tensor rhs, Tensor offsets, Tensor slots, int top_k, str gather, bool sum_lhs, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    problem=_problem,
)
