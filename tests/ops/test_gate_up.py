import pytest
import torch

from tests import helpers
from tests.helpers import LAYOUTS, NUMBERS, Case, Problem, assert_close, bitwise_equal

OP = "gate_up"

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
    Case(150, 3, 5, 72, 200, "swiglu_oai", routing="sentinels", interleaved=True),
    Case(63, 2, 8, 64, 8, "swiglu_clamp_before", block_m=16, interleaved=True),
]


#: 64 rows a tile for Triton, 128 for Hopper's kernels too.
BLOCK_M = pytest.mark.parametrize("block_m", [64, 128])


def run(p, x, w, bias, store_h=True, store_a=True):
    plan = (p.plan.offsets_E1, p.plan.slots_R, p.plan.tiles_2M, p.plan.block_m, p.case.K)
    return torch.ops.moe_kernels.gate_up(x, w, bias, *plan, p.case.activation, store_h, store_a, *p.case.options)


def check(p, bias):
    h, a = run(p, p.x, p.w_gate_up, bias)
    assert h.shape == (p.case.T * p.case.K, p.case.N) and a.shape == (p.case.T * p.case.K, p.case.I)
    arguments = (p.x, p.w_gate_up, bias)
    truth, plain = helpers.gate_up(p, *helpers.doubled(*arguments)), helpers.gate_up(p, *arguments)
    for name, ours, true, torchs in zip(("H", "A"), (h, a), truth, plain):
        assert_close(ours[: p.kept], true, torchs, name)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(target, case, bias):
    p = Problem(case, target.device, target.dtype)
    check(p, p.bias_gate_up if bias else None)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
def test_activations(target, activation, interleaved, bias):
    p = Problem(Case(50, 2, 4, 64, 40, activation, interleaved=interleaved), target.device, target.dtype)
    check(p, p.bias_gate_up if bias else None)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
def test_activations_of_large_tiles(target, activation, interleaved, transposed, bias):
    """Whole steps of 64 columns that end inside a tile of 128 or 256; experts of any number of rows, and of none."""
    case = Case(90, 2, 8, 64, 320, activation, routing="empty", block_m=128, interleaved=interleaved)
    p = Problem(case, target.device, target.dtype)
    if transposed:
        p.w_gate_up = p.w_gate_up.mT.contiguous().mT
    check(p, p.bias_gate_up if bias else None)


@BLOCK_M
@pytest.mark.parametrize("activation,interleaved", [("swiglu", False), ("silu", False), ("swiglu", True)])
def test_an_output_nobody_reads_comes_back_empty(target, activation, interleaved, block_m):
    case = Case(50, 2, 4, 64, 40, activation, block_m=block_m, interleaved=interleaved)
    p = Problem(case, target.device, target.dtype)
    h, a = run(p, p.x, p.w_gate_up, None)
    only_h, no_a = run(p, p.x, p.w_gate_up, None, store_a=False)
    no_h, only_a = run(p, p.x, p.w_gate_up, None, store_h=False)
    assert bitwise_equal(only_h, h) and bitwise_equal(only_a, a)
    assert no_a.shape == (0, p.case.I) and no_h.shape == (0, p.case.N)


@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
def test_strided_inputs(target, interleaved):
    p = Problem(Case(50, 2, 4, 72, 40, interleaved=interleaved), target.device, target.dtype)
    expected = run(p, p.x, p.w_gate_up, None)
    wide = torch.full((50, 200), torch.nan, device=target.device, dtype=target.dtype)
    wide[:, 64:136] = p.x
    transposed = p.w_gate_up.mT.contiguous().mT  # [E, D, N] storage, as some checkpoints keep it
    for x, w in (
        (wide[:, 64:136], p.w_gate_up),
        (p.x.T.contiguous().T, p.w_gate_up),
        (p.x, transposed),
        (p.x, torch.stack([p.w_gate_up] * 2, 1)[:, 0]),
    ):
        for name, ours, contiguous in zip(("H", "A"), run(p, x, w, None), expected):
            assert_close(ours[: p.kept], contiguous[: p.kept].double(), contiguous[: p.kept], name)


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[4], target.device, target.dtype)
    for a, b in zip(run(p, p.x, p.w_gate_up, None), run(p, p.x, p.w_gate_up, None)):
        assert bitwise_equal(a[: p.kept], b[: p.kept])


@BLOCK_M
@pytest.mark.parametrize("activation", NUMBERS)
def test_other_numbers_are_run_time_arguments(target, activation, block_m):
    """A limit that nothing reaches is no limit; with alpha 1 and none, OAI's is swiglu with up + 1."""
    p = Problem(Case(50, 2, 4, 64, 40, block_m=block_m), target.device, target.dtype)
    plan = (p.plan.offsets_E1, p.plan.slots_R, p.plan.tiles_2M, p.plan.block_m, p.case.K)
    arguments = p.x, p.w_gate_up, p.bias_gate_up, *plan
    alpha = 1.0 if activation == "swiglu_oai" else None
    h, a = torch.ops.moe_kernels.gate_up(*arguments, activation, True, True, alpha, 1e4)
    _, swiglu = torch.ops.moe_kernels.gate_up(*arguments, "swiglu", True, True)
    h, a, swiglu = (t[: p.kept].float() for t in (h, a, swiglu))
    if activation == "swiglu_oai":
        swiglu = swiglu + torch.nn.functional.silu(h[:, : p.case.I])
    assert helpers.relative_l2(a, swiglu) <= 4 * torch.finfo(target.dtype).eps


@BLOCK_M
@pytest.mark.parametrize("activation", [*NUMBERS, "swiglu", "relu2"])
def test_nan_is_not_hidden(target, activation, block_m):
    p = Problem(Case(50, 2, 4, 64, 40, activation, block_m=block_m), target.device, target.dtype)
    x = p.x.clone()
    x[7, 3] = torch.nan
    _, a = run(p, x, p.w_gate_up, None)
    assert torch.equal(a[: p.kept].isnan().any(1), p.token_r == 7)
