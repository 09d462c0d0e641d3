import pytest
import torch

from tests import helpers
from tests.helpers import Case, Problem, assert_close, bitwise_equal, odd_rows, shifted

OP = "grouped_wgrad"

CASES = [
    Case(63, 2, 8, 64, 32),
    Case(1, 1, 1, 8, 8),
    Case(0, 2, 4, 64, 32),
    Case(130, 2, 4, 72, 40),
    Case(97, 3, 5, 200, 24, routing="sentinels"),
    Case(70, 2, 4, 64, 136, routing="all_to_one"),
    Case(80, 2, 8, 24, 200, routing="empty"),
    Case(17, 2, 4, 40, 24, routing="all_dropped"),
    Case(100, 2, 4, 128, 72),
    Case(60, 2, 3, 264, 520),
    Case(150, 2, 4, 320, 192),
]


def sides(p, gather):
    """The op's two sides, and the same as rows in expert order."""
    rows = {"lhs": p.d_out, "rhs": p.x}
    match gather:
        case "none":
            return (p.y, p.a), (p.y, p.a)
        case "lhs":
            return (p.d_out, p.a), (rows["lhs"][p.token_r], p.a)
        case "rhs":
            return (p.a, p.x), (p.a, rows["rhs"][p.token_r])


def run(p, lhs, rhs, gather, sum_lhs=True, out_dtype=None):
    return torch.ops.moe_kernels.grouped_wgrad(
        lhs, rhs, p.plan.offsets_E1, p.plan.slots_R, p.case.K, gather, sum_lhs, out_dtype or lhs.dtype
    )


@pytest.mark.parametrize("gather", ["none", "lhs", "rhs"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(target, case, gather):
    p = Problem(case, target.device, target.dtype)
    (lhs, rhs), rows = sides(p, gather)
    truth, plain = helpers.grouped_wgrad(p, *helpers.doubled(*rows)), helpers.grouped_wgrad(p, *rows)
    for name, ours, true, torchs in zip(("dW", "db"), run(p, lhs, rhs, gather), truth, plain):
        assert_close(ours, true, torchs, name)
        empty = p.plan.tokens_per_expert_E == 0
        assert (ours[empty] == 0).all(), f"{name} of an expert without rows must be zero"


@pytest.mark.parametrize("gather", ["lhs", "rhs"])
def test_float32_gradient_is_not_rounded_on_the_way(target, gather):
    """The gradient of an fp32 parameter under autocast: fp32 sums of half-precision operands, rounded nowhere."""
    p = Problem(Case(200, 2, 4, 64, 40), target.device, target.dtype)
    (lhs, rhs), rows = sides(p, gather)
    truth = helpers.grouped_wgrad(p, *helpers.doubled(*rows))
    for name, ours, true in zip(("dW", "db"), run(p, lhs, rhs, gather, out_dtype=torch.float32), truth):
        assert ours.dtype == torch.float32
        assert_close(ours, true, what=name)


def test_no_sum_comes_back_empty(target):
    p = Problem(CASES[3], target.device, target.dtype)
    (lhs, rhs), _ = sides(p, "lhs")
    dw, db = run(p, lhs, rhs, "lhs", sum_lhs=False)
    assert db.shape == (0, p.case.D)
    assert bitwise_equal(dw, run(p, lhs, rhs, "lhs")[0])


@pytest.mark.parametrize("gather", ["none", "lhs", "rhs"])
@pytest.mark.parametrize("case", [CASES[2], *CASES[4:8], CASES[10]], ids=str)
def test_sums_alone(target, case, gather):
    """A bias's gradient where nobody wants the weight's: an rhs without columns."""
    p = Problem(case, target.device, target.dtype)
    (lhs, rhs), rows = sides(p, gather)
    dw, db = run(p, lhs, rhs[:, :0], gather)
    assert dw.shape == (case.E, lhs.shape[1], 0) and dw.dtype == db.dtype == lhs.dtype
    truth, plain = (helpers.grouped_wgrad(p, *r)[1] for r in (helpers.doubled(*rows), rows))
    assert_close(db, truth, plain)
    assert (db[p.plan.tokens_per_expert_E == 0] == 0).all()


def test_strided_inputs(target):
    p = Problem(Case(50, 2, 4, 72, 40), target.device, target.dtype)
    (lhs, rhs), _ = sides(p, "lhs")
    expected = run(p, lhs, rhs, "lhs")
    wide = torch.full((50, 200), torch.nan, device=target.device, dtype=target.dtype)
    wide[:, 64:136] = lhs
    for left, right in (
        (wide[:, 64:136], rhs),
        (lhs.T.contiguous().T, rhs),
        (lhs, rhs.T.contiguous().T),
        (lhs[:1].expand(50, 72), rhs),  # how autograd hands over the gradient of a sum
    ):
        reference = expected if left.stride(0) else run(p, left.contiguous(), rhs, "lhs")
        for name, ours, contiguous in zip(("dW", "db"), run(p, left, right, "lhs"), reference):
            assert_close(ours, contiguous.double(), contiguous, name)


@pytest.mark.parametrize("gather", ["none", "lhs", "rhs"])
@pytest.mark.parametrize("place", [shifted, odd_rows])
def test_inputs_that_are_not_aligned(target, place, gather):
    p = Problem(CASES[4], target.device, target.dtype)
    (lhs, rhs), rows = sides(p, gather)
    truth, plain = helpers.grouped_wgrad(p, *helpers.doubled(*rows)), helpers.grouped_wgrad(p, *rows)
    p.plan = p.plan._replace(**{name: shifted(getattr(p.plan, name)) for name in ("offsets_E1", "slots_R")})
    for name, ours, true, torchs in zip(("dW", "db"), run(p, place(lhs), place(rhs), gather), truth, plain):
        assert_close(ours, true, torchs, name)


@pytest.mark.parametrize("float32", [False, True], ids=["same-dtype", "float32"])
@pytest.mark.parametrize("gather", ["none", "lhs", "rhs"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accumulation(target, case, gather, float32, poison):
    """What autograd does with a gradient: it is rounded, then added with one more rounding."""
    p = Problem(case, target.device, target.dtype)
    (lhs, rhs), _ = sides(p, gather)
    dtype = torch.float32 if float32 else target.dtype
    into = torch.randn(case.E, lhs.shape[1], rhs.shape[1], device=target.device).to(dtype)
    expected = into + run(p, lhs, rhs, gather, False, dtype)[0]
    arguments = p.plan.offsets_E1, p.plan.slots_R, case.K, gather, into
    assert torch.ops.moe_kernels.grouped_wgrad_(lhs, rhs, *arguments) is None
    assert bitwise_equal(into, expected)


def test_accumulation_into_a_slice_of_a_flat_buffer(target):
    """Which begins where it happens to."""
    p = Problem(CASES[3], target.device, target.dtype)
    (lhs, rhs), _ = sides(p, "lhs")
    dw = run(p, lhs, rhs, "lhs", False)[0]
    flat = torch.zeros(dw.numel() + 2, device=target.device, dtype=target.dtype)
    into = flat[1:-1].view_as(dw)
    torch.ops.moe_kernels.grouped_wgrad_(lhs, rhs, p.plan.offsets_E1, p.plan.slots_R, p.case.K, "lhs", into)
    assert bitwise_equal(into, dw) and not flat[[0, -1]].any()


@pytest.mark.parametrize("gather", ["lhs", "rhs"])
def test_rerun_is_bitwise_equal(target, gather):
    p = Problem(CASES[4], target.device, target.dtype)
    (lhs, rhs), _ = sides(p, gather)
    for a, b in zip(run(p, lhs, rhs, gather), run(p, lhs, rhs, gather)):
        assert bitwise_equal(a, b)
