import pytest
import torch

from tests import helpers
from tests.helpers import LAYOUTS, NUMBERS, Case, Problem, assert_close, bitwise_equal

OP = "d_activation"

CASES = [
    Case(63, 2, 8, 64, 32, block_m=16),
    Case(1, 1, 1, 8, 8, block_m=16),
    Case(0, 2, 4, 64, 32, block_m=64),
    Case(130, 2, 4, 72, 40, block_m=64),
    Case(97, 3, 5, 200, 24, routing="sentinels", block_m=32),
    Case(70, 2, 4, 64, 136, routing="all_to_one", block_m=128),
    Case(80, 2, 8, 24, 200, routing="empty", block_m=64),
    Case(17, 2, 4, 40, 24, routing="all_dropped", block_m=16),
    Case(90, 4, 3, 64, 72, "relu2", routing="duplicates", block_m=64),
    Case(300, 2, 3, 128, 200, block_m=128),
    Case(150, 3, 5, 64, 72, routing="sentinels", block_m=128),
    Case(40, 2, 4, 24, 520, routing="sentinels", block_m=16),
    Case(150, 3, 5, 72, 520, "swiglu_oai", routing="sentinels", interleaved=True),
    Case(63, 2, 8, 64, 8, "swiglu_clamp_before", block_m=16, interleaved=True),
]


#: 64 rows a tile for Triton, 128 for Hopper's kernels too.
BLOCK_M = pytest.mark.parametrize("block_m", [64, 128])


def rest(p, weights=None):
    plan = (p.plan.offsets_E1, p.plan.slots_R, p.plan.tiles_2M, p.plan.block_m)
    return (p.weights if weights is None else weights, *plan, p.case.activation, *p.case.options)


def check(p, weights):
    h = p.h.clone()
    dh, a_scaled, d_weights = torch.ops.moe_kernels.d_activation(p.d_out, p.w_down, h, *rest(p, weights))
    assert bitwise_equal(h, p.h), "h was written over"
    assert d_weights.dtype == torch.float32 and a_scaled.shape == p.a.shape and dh.shape == h.shape

    arguments = (p.d_out, p.w_down, p.h, weights)
    truth, plain = helpers.d_activation(p, *helpers.doubled(*arguments)), helpers.d_activation(p, *arguments)
    assert_close(dh[: p.kept], truth[0], plain[0], "dH")
    assert_close(a_scaled[: p.kept], truth[1], plain[1], "A'")
    # dS is stored in fp32 but comes from products of half-precision data: compare it in the dtype of the data
    assert_close(d_weights.to(p.x.dtype), truth[2], plain[2], "dS")
    dropped = p.plan.positions_TK < 0
    assert (d_weights[dropped] == 0).all(), "dS of a dropped slot"


@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(target, case, weights):
    p = Problem(case, target.device, target.dtype)
    check(p, p.weights if weights == "same" else p.weights.float() * 1.01)


@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
def test_activations(target, activation, interleaved):
    p = Problem(Case(50, 2, 4, 64, 40, activation, interleaved=interleaved), target.device, target.dtype)
    check(p, p.weights)


@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
def test_activations_of_large_tiles(target, activation, interleaved, transposed):
    """Whole steps of 64 columns that end inside a tile of 256; experts of any number of rows, and of none."""
    case = Case(90, 2, 8, 64, 320, activation, routing="empty", block_m=128, interleaved=interleaved)
    p = Problem(case, target.device, target.dtype)
    if transposed:
        p.w_down = p.w_down.mT.contiguous().mT
    check(p, p.weights)


@BLOCK_M
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("activation", NUMBERS)
def test_at_and_beyond_the_limit(target, activation, interleaved, block_m):
    """As torch.clamp: the limit itself passes its gradient, what lies beyond gets none."""
    case = Case(50, 2, 4, 64, 40, activation, block_m=block_m, interleaved=interleaved)
    p = Problem(case, target.device, target.dtype)
    limit = NUMBERS[activation][1]
    p.h[: p.kept] = torch.where(p.h[: p.kept].abs() > limit, p.h[: p.kept].sign() * limit, p.h[: p.kept])
    p.h[: p.kept : 2] *= 2
    check(p, p.weights)


@BLOCK_M
@pytest.mark.parametrize("activation", NUMBERS)
def test_nan_in_h(target, activation, block_m):
    """Comes out in A', and as torch has it the clamps give it no gradient."""
    p = Problem(Case(50, 2, 4, 64, 40, activation, block_m=block_m), target.device, target.dtype)
    p.h[3, 5] = p.h[4, 45] = torch.nan
    dh, a_scaled, _ = torch.ops.moe_kernels.d_activation(p.d_out, p.w_down, p.h, *rest(p))
    truth = helpers.d_activation(p, p.d_out, p.w_down, p.h, p.weights)
    for name, ours, torchs in zip(("dH", "A'"), (dh, a_scaled), truth):
        assert torch.equal(ours[: p.kept].isnan(), torchs.isnan()), name


OVER_H = [
    *[CASES[3], CASES[4], CASES[8], CASES[12]],
    *(
        Case(90, 2, 3, 64, 200, name, block_m=128, interleaved=turn)
        for name, turn in (("relu2", False), ("swiglu_oai", True))
    ),
]


@pytest.mark.parametrize("case", OVER_H, ids=str)
def test_over_h_gives_the_same_bits(target, case):
    p = Problem(case, target.device, target.dtype)
    dh, *apart = torch.ops.moe_kernels.d_activation(p.d_out, p.w_down, p.h, *rest(p))
    h = p.h.clone()
    over = torch.ops.moe_kernels.d_activation_(p.d_out, p.w_down, h, *rest(p))
    assert bitwise_equal(h[: p.kept], dh[: p.kept])
    assert bitwise_equal(h[p.kept :], p.h[p.kept :]), "rows no expert owns were written"
    assert bitwise_equal(over[0][: p.kept], apart[0][: p.kept]) and bitwise_equal(over[1], apart[1])


def test_strided_inputs(target):
    p = Problem(Case(50, 2, 4, 72, 40), target.device, target.dtype)
    expected = torch.ops.moe_kernels.d_activation(p.d_out, p.w_down, p.h, *rest(p))
    wide = torch.full((50, 200), torch.nan, device=target.device, dtype=target.dtype)
    wide[:, 64:136] = p.d_out
    for d_out, w, weights in (
        (wide[:, 64:136], p.w_down, p.weights),
        (p.d_out.T.contiguous().T, p.w_down, p.weights),
        (p.d_out, p.w_down.mT.contiguous().mT, p.weights),
        (p.d_out, p.w_down, p.weights.T.contiguous().T),
    ):
        ours = torch.ops.moe_kernels.d_activation(d_out, w, p.h, *rest(p, weights))
        for name, tensor, contiguous in zip(("dH", "A'", "dS"), ours, expected):
            assert_close(tensor, contiguous.double(), contiguous, name)


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[4], target.device, target.dtype)
    first, second = (torch.ops.moe_kernels.d_activation(p.d_out, p.w_down, p.h, *rest(p)) for _ in range(2))
    for a, b in zip(first[:2], second[:2]):
        assert bitwise_equal(a[: p.kept], b[: p.kept])
    assert bitwise_equal(first[2], second[2]), "dS is a sum in a fixed order"
