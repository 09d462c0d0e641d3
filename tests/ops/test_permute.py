import pytest
import torch

from tests.helpers import Case, Problem, assert_close, bitwise_equal

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
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)


def run(p, x, weights):
    return torch.ops.moe_kernels.permute(x, weights, p.plan.offsets_E1, p.plan.slots_R, p.case.K)


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

    def formula(x, w):
        return x[p.token_r] * w.flatten()[p.slot_r, None].to(x.dtype)

    assert_close(out[: p.kept], formula(p.x.double(), w.double()), formula(p.x, w))
    assert (out[p.kept :] == 0).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["copy", "weighted"])
def test_strided_input(target, weighted):
    p = Problem(Case(37, 2, 4, 72, 8), target.device, target.dtype)
    weights = p.weights if weighted else None
    expected = run(p, p.x, weights)
    wide = torch.full((37, 200), torch.nan, device=target.device, dtype=target.dtype)
    wide[:, 64:136] = p.x
    assert bitwise_equal(run(p, wide[:, 64:136], weights), expected)
    assert bitwise_equal(run(p, p.x.T.contiguous().T, weights), expected)
    if weighted:
        assert bitwise_equal(run(p, p.x, weights.T.contiguous().T), expected)


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[3], target.device, target.dtype)
    assert bitwise_equal(run(p, p.x, p.weights), run(p, p.x, p.weights))
