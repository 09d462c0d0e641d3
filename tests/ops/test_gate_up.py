import pytest
import torch

from tests import helpers
from tests.helpers import ACTIVATIONS, Case, Problem, assert_close, bitwise_equal

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
]


def run(p, x, w, bias, store_h=True, store_a=True):
    plan = (p.plan.offsets_E1, p.plan.slots_R, p.plan.tiles_2M, p.plan.block_m, p.case.K)
    return torch.ops.moe_kernels.gate_up(x, w, bias, *plan, p.case.activation, store_h, store_a)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(target, activation):
    p = Problem(Case(50, 2, 4, 64, 40, activation), target.device, target.dtype)
    check(p, p.bias_gate_up)


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_an_output_nobody_reads_comes_back_empty(target, activation):
    p = Problem(Case(50, 2, 4, 64, 40, activation), target.device, target.dtype)
    h, a = run(p, p.x, p.w_gate_up, None)
    only_h, no_a = run(p, p.x, p.w_gate_up, None, store_a=False)
    no_h, only_a = run(p, p.x, p.w_gate_up, None, store_h=False)
    assert bitwise_equal(only_h, h) and bitwise_equal(only_a, a)
    assert no_a.shape == (0, p.case.I) and no_h.shape == (0, p.case.N)


def test_strided_inputs(target):
    p = Problem(Case(50, 2, 4, 72, 40), target.device, target.dtype)
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
