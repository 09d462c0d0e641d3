"""The test machinery itself: poison reaches the library and nobody else, the counter counts, the table rejects."""

import pytest
import torch

from tests.conftest import POISON_INTEGER
from tests.helpers import Case, Problem, assert_close, bitwise_equal, naive_rows, op_arguments

ALLOCATIONS = ("torch.empty(3)", "torch.empty_like(x)", "x.new_empty(3)", "torch.empty_strided((3,), (1,))")


def allocate(expression, module, dtype=torch.float32):
    """Run an allocation as if the code stood in ``module``."""
    scope = {"__name__": module, "torch": torch, "x": torch.zeros(3, dtype=dtype)}
    return eval(compile(expression, module, "eval"), scope)


@pytest.mark.parametrize("expression", ALLOCATIONS)
def test_poison(poison, expression):
    assert allocate(expression, "moe_kernels.backends.reference.permute").isnan().all()


def test_poison_of_integers_spares_the_tests(poison):
    ours = allocate("torch.empty(3, dtype=torch.int32)", "moe_kernels.ops.permute")
    assert (ours == POISON_INTEGER).all()
    kept = allocate("torch.empty(3).fill_(1)", "tests.ops.test_permute")
    assert (kept == 1).all()


def test_op_counter(op_counter):
    p = Problem(Case(4, 2, 3, 8, 8, block_m=16))
    with op_counter:
        torch.ops.moe_kernels.permute(*op_arguments("permute", p))
        p.x + 1
    assert op_counter.calls == {"permute": 1}
    assert op_counter.dtypes["permute"][0][0] == torch.float32


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t[3].zero_(),
        lambda t: t[3, 2].fill_(torch.nan),
        lambda t: t[3, 2].add_(0.01),
        lambda t: t.mul_(1 + 1e-4),
    ],
    ids=["a row", "a nan", "an element", "all a little"],
)
def test_assert_close_rejects(spoil):
    truth = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    assert_close(truth.clone(), truth.double())
    with pytest.raises(AssertionError):
        spoiled = truth.clone()
        spoil(spoiled)
        assert_close(spoiled, truth.double())


def test_assert_close_holds_half_precision_to_twice_plain_torch():
    truth = torch.randn(100, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = truth.bfloat16()
    assert_close(plain, truth, plain)
    with pytest.raises(AssertionError, match="relative L2"):
        assert_close((truth * 1.01).bfloat16(), truth, plain)


def test_bitwise_equal_sees_nan_and_signed_zero():
    nan = torch.tensor([torch.nan, 0.0])
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(nan, torch.tensor([torch.nan, -0.0]))


@pytest.mark.parametrize("routing,kept", [("all_dropped", 0), ("all_to_one", 24), ("uniform", 24)])
def test_routings(routing, kept):
    p = Problem(Case(12, 2, 5, 8, 8, routing=routing))
    assert p.kept == kept == len(naive_rows(p.indices, 5).experts)


@pytest.mark.parametrize("routing", ["empty", "sentinels", "duplicates"])
def test_routings_have_what_their_name_says(routing):
    p = Problem(Case(40, 3, 7, 8, 8, routing=routing))
    counts = p.plan.tokens_per_expert_E
    if routing == "empty":
        assert counts[0] == counts[-1] == counts[1] == 0 and counts.sum() == 120
    elif routing == "sentinels":
        assert (p.indices < 0).any() and (p.indices >= 7).any() and (p.plan.positions_TK[0] < 0).all()
    else:
        ids = p.indices.sort(1).values
        assert (ids[:, 1:] == ids[:, :-1]).any()
