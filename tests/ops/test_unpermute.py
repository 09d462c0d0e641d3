import pytest
import torch

from tests import helpers
from tests.helpers import Case, Problem, assert_close, bitwise_equal, odd_rows, shifted

OP = "unpermute"

CASES = [
    Case(63, 2, 8, 64, 8),
    Case(1, 1, 1, 8, 8),
    Case(0, 2, 4, 64, 8),
    Case(65, 3, 9, 200, 8, routing="sentinels"),
    Case(64, 2, 4, 24, 8, routing="all_to_one"),
    Case(17, 2, 4, 40, 8, routing="all_dropped"),
    Case(33, 8, 16, 1032, 8, routing="duplicates"),
    Case(70, 1, 3, 16, 8, routing="sentinels"),
    Case(5, 4, 6, 2880, 8),
    Case(3, 8, 16, 7168, 8),
    Case(21, 12, 16, 8, 8, routing="sentinels"),  # more rows per token than a power of two
]


@pytest.mark.parametrize("weights", ["none", "same", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(target, case, weights):
    p = Problem(case, target.device, target.dtype)
    w = {"none": None, "same": p.weights, "float32": p.weights.float() * 1.01}[weights]
    out = torch.ops.moe_kernels.unpermute(p.y, p.plan.positions_TK, w)
    truth = helpers.combine(p, *helpers.doubled(p.y, w), None)
    assert_close(out, truth, helpers.combine(p, p.y, w, None))


def test_strided_input(target):
    p = Problem(CASES[3], target.device, target.dtype)
    expected = torch.ops.moe_kernels.unpermute(p.y, p.plan.positions_TK, p.weights)
    for start in (64, 3):  # rows that start at multiples of 16 bytes, and others
        wide = torch.full((p.y.shape[0], 264), torch.nan, device=target.device, dtype=target.dtype)
        rows = wide[:, start : start + 200].copy_(p.y)
        assert bitwise_equal(torch.ops.moe_kernels.unpermute(rows, p.plan.positions_TK, p.weights), expected)
    columns = p.y.T.contiguous().T
    assert bitwise_equal(torch.ops.moe_kernels.unpermute(columns, p.plan.positions_TK, p.weights), expected)


@pytest.mark.parametrize("place", [shifted, odd_rows])
def test_inputs_that_are_not_aligned(target, place):
    p = Problem(CASES[3], target.device, target.dtype)
    expected = torch.ops.moe_kernels.unpermute(p.y, p.plan.positions_TK, p.weights)
    placed = place(p.y), shifted(p.plan.positions_TK), place(p.weights)
    assert bitwise_equal(torch.ops.moe_kernels.unpermute(*placed), expected)


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[6], target.device, target.dtype)
    first, second = (torch.ops.moe_kernels.unpermute(p.y, p.plan.positions_TK, p.weights) for _ in range(2))
    assert bitwise_equal(first, second)
