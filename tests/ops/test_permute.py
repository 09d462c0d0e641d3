import pytest
import torch

from tests.helpers import Case, Problem, assert_close, bitwise_equal, odd_rows, shifted

OP = "permute"

CASES = [
    Case(63, 2, 8, 64, 8),
    Case(1, 1, 1, 8, 8),
    Case(0, 2, 4, 64, 8),
    Case(65, 3, 9, 200, 8, routing="sentinels"),
    Case(64, 2, 4, 24, 8, routing="all_to_one"),
    Case(40, 4, 12, 72, 8, routing="empty"),
    Case(17, 2, 4, 40, 8, routing="all_dropped"),
    Case(9, 5, 3, 1032, 8, routing="duplicates"),
    Case(70, 1, 3, 16, 8, routing="sentinels"),
    Case(5, 4, 6, 2880, 8),
    Case(3, 8, 16, 7168, 8),
    Case(21, 12, 16, 8, 8, routing="sentinels"),  # more rows per token than a power of two
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)


def run(p, x, weights):
    return torch.ops.moe_kernels.permute(x, weights, p.plan.offsets_E1, p.plan.slots_R, p.plan.positions_TK)


def scaled(p, x, weights):
    """The rows of the slots that are not dropped."""
    return x[p.token_r] * weights.flatten()[p.slot_r, None].to(x.dtype)


@TABLE
def test_copy(target, case):
    p = Problem(case, target.device, target.dtype)
    out = run(p, p.x, None)
    assert torch.equal(out[: p.kept], p.x[p.token_r]), "a copy is exact"
    assert (out[p.kept :] == 0).all(), "rows of dropped slots are zero"


@TABLE
@pytest.mark.parametrize("weights", ["same", "float32"])
def test_weighted(target, case, weights):
    p = Problem(case, target.device, target.dtype)
    w = p.weights if weights == "same" else p.weights.float() * 1.01
    out = run(p, p.x, w)
    assert_close(out[: p.kept], scaled(p, p.x.double(), w.double()), scaled(p, p.x, w))
    assert (out[p.kept :] == 0).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["copy", "weighted"])
def test_strided_input(target, weighted):
    p = Problem(Case(37, 2, 4, 72, 8), target.device, target.dtype)
    weights = p.weights if weighted else None
    expected = run(p, p.x, weights)
    for start in (64, 3):  # rows that start at multiples of 16 bytes, and others
        wide = torch.full((37, 200), torch.nan, device=target.device, dtype=target.dtype)
        wide[:, start : start + 72] = p.x
        assert bitwise_equal(run(p, wide[:, start : start + 72], weights), expected)
    assert bitwise_equal(run(p, p.x.T.contiguous().T, weights), expected)
    if weighted:
        assert bitwise_equal(run(p, p.x, weights.T.contiguous().T), expected)


@pytest.mark.parametrize("place", [shifted, odd_rows])
@pytest.mark.parametrize("weighted", [False, True], ids=["copy", "weighted"])
def test_inputs_that_are_not_aligned(target, weighted, place):
    p = Problem(CASES[3], target.device, target.dtype)
    expected = run(p, p.x, p.weights if weighted else None)
    p.plan = p.plan._replace(**{name: shifted(getattr(p.plan, name)) for name in p.plan._fields[:3]})
    assert bitwise_equal(run(p, place(p.x), place(p.weights) if weighted else None), expected)


def test_a_dropped_slots_weight_does_not_matter(target):
    p = Problem(CASES[3], target.device, target.dtype)
    weights = torch.where(p.plan.positions_TK < 0, torch.nan, p.weights)
    assert bitwise_equal(run(p, p.x, weights), run(p, p.x, p.weights))


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[3], target.device, target.dtype)
    assert bitwise_equal(run(p, p.x, p.weights), run(p, p.x, p.weights))
