import pytest
import torch

from moe_kernels.functional import permute, unpermute
from tests.helpers import Case, Problem

CASES = [
    Case(13, 2, 4, 8, 8, block_m=16),
    Case(1, 1, 1, 8, 8, block_m=16),
    Case(9, 3, 5, 7, 8, routing="sentinels", block_m=16),
    Case(8, 2, 4, 8, 8, routing="all_to_one", block_m=16),
    Case(6, 2, 4, 8, 8, routing="all_dropped", block_m=16),
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


@TABLE
def test_permute_gradient(case):
    p = Problem(case, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: permute(x, p.plan), leaf(p.x))


@TABLE
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
def test_unpermute_gradient(case, weighted):
    p = Problem(case, dtype=torch.float64)
    y = leaf(p.y.nan_to_num())  # gradcheck perturbs every row, the dropped ones too
    if weighted:
        assert torch.autograd.gradcheck(lambda y, s: unpermute(y, p.plan, s), (y, leaf(p.weights)))
    else:
        assert torch.autograd.gradcheck(lambda y: unpermute(y, p.plan), y)


@TABLE
def test_rows_of_dropped_slots_are_never_read(case):
    p = Problem(case)
    y, s = leaf(p.y), leaf(p.weights)  # those rows of y hold NaN
    out = unpermute(y, p.plan, s)
    out.backward(p.d_out)
    assert out.isfinite().all() and s.grad.isfinite().all() and y.grad.isfinite().all()
    assert (y.grad[p.kept :] == 0).all() and (s.grad[p.plan.positions_TK < 0] == 0).all()


@TABLE
def test_round_trip_multiplies_by_the_kept_slots(case):
    p = Problem(case)
    kept = (p.plan.positions_TK >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(unpermute(permute(p.x, p.plan), p.plan), p.x * kept)


def test_frozen_weights_need_no_rows(op_counter):
    p = Problem(CASES[0])
    y = leaf(p.y)
    out = unpermute(y, p.plan, p.weights)
    with op_counter:
        out.backward(p.d_out)
    assert op_counter.calls["permute"] == 1, "one for y, none for the weights"


def test_expanded_gradient():
    """The gradient of a sum arrives with strides of zero."""
    p = Problem(CASES[0])
    x, y = leaf(p.x), leaf(p.y)
    permute(x, p.plan).sum().backward()
    unpermute(y, p.plan).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, p.case.K)) and torch.equal(y.grad, torch.ones_like(y))
