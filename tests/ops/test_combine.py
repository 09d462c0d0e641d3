import pytest
import torch

from tests import helpers
from tests.helpers import Case, Problem, assert_close, bitwise_equal, odd_rows, shifted

OP = "combine"

CASES = [
    Case(63, 2, 8, 64, 8),
    Case(1, 1, 1, 8, 8),
    Case(0, 2, 4, 64, 8),
    Case(65, 3, 9, 200, 8, routing="sentinels"),
    Case(64, 2, 4, 24, 8, routing="all_to_one"),
    Case(17, 2, 4, 40, 8, routing="all_dropped"),
    Case(33, 8, 16, 1032, 8, routing="duplicates"),
    Case(5, 10, 12, 72, 8),  # more rows per token than a power of two
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)


def run(p, y, weights, residual, out=None):
    out = torch.full_like(p.x, torch.nan) if out is None else out
    assert torch.ops.moe_kernels.combine(out, y, p.plan.positions_TK, weights, residual) is None
    return out


@TABLE
@pytest.mark.parametrize("weights", ["none", "same", "float32"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_values(target, case, weights, residual):
    p = Problem(case, target.device, target.dtype)
    w = {"none": None, "same": p.weights, "float32": p.weights.float() * 1.01}[weights]
    r = p.residual if residual else None
    out = run(p, p.y, w, r)
    assert_close(out, helpers.combine(p, *helpers.doubled(p.y, w, r)), helpers.combine(p, p.y, w, r))


def test_dropped_slots_never_read_their_rows(target):
    """Rows no expert owns hold NaN in every problem here; a weight of NaN at a dropped slot must not matter either."""
    p = Problem(CASES[3], target.device, target.dtype)
    expected = run(p, p.y, p.weights, None)
    weights = torch.where(p.plan.positions_TK < 0, torch.nan, p.weights)
    assert bitwise_equal(run(p, p.y, weights, None), expected)
    assert (expected[0] == 0).all(), "token 0 has no expert: its output is zero"


@pytest.mark.parametrize("start,stop", [(0, 64), (64, 136), (192, 200)])
def test_writes_a_column_slice_and_nothing_else(target, start, stop):
    p = Problem(Case(37, 2, 4, 200, 8), target.device, target.dtype)
    whole = run(p, p.y, p.weights, p.residual)
    out = torch.full_like(whole, 7)
    columns = slice(start, stop)
    run(p, p.y[:, columns].contiguous(), p.weights, p.residual[:, columns], out[:, columns])
    assert bitwise_equal(out[:, columns].contiguous(), whole[:, columns].contiguous())
    out[:, columns] = 7
    assert (out == 7).all()


def test_strided_inputs(target):
    p = Problem(CASES[3], target.device, target.dtype)
    expected = run(p, p.y, p.weights, p.residual)
    wide = torch.full((p.y.shape[0], 264), torch.nan, device=target.device, dtype=target.dtype)
    wide[:, 64:] = p.y
    strided = run(p, wide[:, 64:], p.weights.T.contiguous().T, p.residual.T.contiguous().T)
    assert bitwise_equal(strided, expected)


@pytest.mark.parametrize("place", [shifted, odd_rows])
def test_inputs_that_are_not_aligned(target, place):
    p = Problem(CASES[3], target.device, target.dtype)
    expected = run(p, p.y, p.weights, p.residual)
    p.plan = p.plan._replace(positions_TK=shifted(p.plan.positions_TK))
    assert bitwise_equal(run(p, place(p.y), place(p.weights), place(p.residual)), expected)


@pytest.mark.parametrize("place", [shifted, odd_rows])
def test_an_output_that_is_not_aligned(target, place):
    """With a residual apart and, as an output may be, in the same place; what lies around it stays."""
    p = Problem(CASES[3], target.device, target.dtype)
    expected = run(p, p.y, p.weights, p.residual)
    out = place(p.residual)
    around = out._base.clone()
    for residual in (out, p.residual):
        run(p, p.y, p.weights, residual, out)
        assert bitwise_equal(out.contiguous(), expected)
        out.copy_(p.residual)
        assert bitwise_equal(out._base, around), "written beside the output"


def test_residual_may_be_the_output(target):
    p = Problem(CASES[0], target.device, target.dtype)
    expected = run(p, p.y, p.weights, p.residual)
    out = p.residual.clone()
    assert bitwise_equal(run(p, p.y, p.weights, out, out), expected)


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[6], target.device, target.dtype)
    assert bitwise_equal(run(p, p.y, p.weights, None), run(p, p.y, p.weights, None))
