"""grouped_wgrad: dW[e] = sum over the rows r of expert e of lhs(r)^T . rhs(r), and optionally db[e] = sum of lhs(r).

At most one side is gathered: ``gather`` "lhs" or "rhs" reads row slots[r] // top_k of that tensor ([T, .]), "none"
reads row r of both ([R, .]). ``rhs`` of width 0: only the sums are wanted. Experts without rows get zeros. Products and
sums accumulate in fp32 in a fixed order and are rounded once to ``out_dtype``.

``grouped_wgrad_`` adds the products to ``into`` [E, M, N], of the dtype of lhs or fp32: rounded to its dtype first and
then added with one more rounding, as autograd adds a gradient to ``.grad``, so both ways give the same numbers. Each
element is added to once, and those of an expert without rows keep what they hold.
"""

import torch

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define

GATHERS = ("none", "lhs", "rhs")


def _check_sides(lhs, rhs, offsets_E1, slots_R, top_k, gather):
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


def _check(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype):
    op = "grouped_wgrad"
    _check_sides(lhs, rhs, offsets_E1, slots_R, top_k, gather)
    if out_dtype not in c.FLOATS:
        c.fail(op, "out_dtype", out_dtype, "a floating dtype")


def _check_into(lhs, rhs, offsets_E1, slots_R, top_k, gather, into_EMN):
    op = "grouped_wgrad"
    _check_sides(lhs, rhs, offsets_E1, slots_R, top_k, gather)
    shape = (offsets_E1.shape[0] - 1, lhs.shape[1], rhs.shape[1])
    if into_EMN.shape != shape or not into_EMN.is_contiguous():
        c.fail(op, "into", into_EMN, f"contiguous, of shape {list(shape)}, not strided {into_EMN.stride()}")
    c.check_device(op, "into", into_EMN, lhs, "lhs")
    if into_EMN.dtype not in (lhs.dtype, torch.float32):
        raise TypeError(f"{op}: into must be {lhs.dtype} like lhs or torch.float32, got {c.describe(into_EMN)}")


def _fake(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype):
    experts, m = offsets_E1.shape[0] - 1, lhs.shape[1]
    return (
        lhs.new_empty((experts, m, rhs.shape[1]), dtype=out_dtype),
        lhs.new_empty((experts, m) if sum_lhs else (0, m), dtype=out_dtype),
    )


def _problem(lhs, rhs, offsets_E1, slots_R, top_k, gather, sum_lhs, out_dtype, into_EMN=None):
    result = str(out_dtype).removeprefix("torch.")
    asked = {
        "gather none": gather == "none",
        "row sums": sum_lhs,
        f"{result} result": out_dtype != lhs.dtype,
        "accumulation": into_EMN is not None,
    }
    traits = tuple(name for name, is_asked in asked.items() if is_asked)
    m, n = lhs.shape[1], rhs.shape[1]
    return Problem(lhs.device, lhs.dtype, (m, n) if n else (m,), traits=traits)


def _kernel_into(run, *args):
    *sides, into_EMN = args
    run(*sides, False, into_EMN.dtype, into_EMN)


_SIDES = "Tensor lhs, Tensor rhs, Tensor offsets, Tensor slots, int top_k, str gather"

define(
    f"grouped_wgrad({_SIDES}, bool sum_lhs, ScalarType out_dtype) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    problem=_problem,
)
define(
    f"grouped_wgrad_({_SIDES}, Tensor(a!) into) -> ()",
    check=_check_into,
    fake=lambda *args: None,
    problem=lambda *args: _problem(*args[:-1], False, args[-1].dtype, args[-1]),
    kernel=_kernel_into,
)
