import pytest
import torch

from tests import helpers
from tests.helpers import Case, Problem, assert_close, bitwise_equal

OP = "grouped_gemm"

# The product is [R, I] . [E, D, I]^T: I is reduced, D comes out
CASES = [
    Case(63, 2, 8, 64, 32, block_m=16),
    Case(1, 1, 1, 8, 8, block_m=16),
    Case(0, 2, 4, 64, 32, block_m=64),
    Case(130, 2, 4, 72, 40, block_m=64),
    Case(97, 3, 5, 200, 24, routing="sentinels", block_m=32),
    Case(70, 2, 4, 136, 64, routing="all_to_one", block_m=128),
    Case(80, 2, 8, 24, 200, routing="empty", block_m=64),
    Case(17, 2, 4, 40, 24, routing="all_dropped", block_m=16),
    Case(300, 2, 3, 128, 200, block_m=128),
    Case(150, 3, 5, 64, 72, routing="sentinels", block_m=128),
    # As gpt-oss: widths of whole steps of 64, but not of whole tiles
    Case(150, 2, 4, 320, 192, block_m=128),
    Case(80, 2, 8, 192, 64, routing="empty", block_m=128),
    Case(0, 2, 4, 64, 32, block_m=128),
]


def run(p, a, w, bias, trans_w):
    return torch.ops.moe_kernels.grouped_gemm(a, w, bias, p.plan.offsets_E1, p.plan.tiles_2M, p.plan.block_m, trans_w)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("trans_w", [True, False], ids=["w-ENC", "w-ECN"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(target, case, trans_w, bias):
    p = Problem(case, target.device, target.dtype)
    w = p.w_down if trans_w else p.w_down.mT.contiguous()
    b = p.bias_down if bias else None
    y = run(p, p.a, w, b, trans_w)
    assert y.shape == (case.T * case.K, case.D)
    truth = helpers.grouped_gemm(p, *helpers.doubled(p.a, w, b), trans_w)
    assert_close(y[: p.kept], truth, helpers.grouped_gemm(p, p.a, w, b, trans_w))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("trans_w", [True, False], ids=["w-ENC", "w-ECN"])
@pytest.mark.parametrize("case", [CASES[3], *CASES[-3:-1]], ids=str)
def test_weights_stored_the_other_way_round(target, case, trans_w, bias):
    """As gpt-oss stores them: read where they lie."""
    p = Problem(case, target.device, target.dtype)
    w = p.w_down.mT.contiguous().mT if trans_w else p.w_down.mT
    b = p.bias_down if bias else None
    y = run(p, p.a, w, b, trans_w)
    truth = helpers.grouped_gemm(p, *helpers.doubled(p.a, w, b), trans_w)
    assert_close(y[: p.kept], truth, helpers.grouped_gemm(p, p.a, w, b, trans_w))


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("trans_w", [True, False], ids=["w-ENC", "w-ECN"])
@pytest.mark.parametrize("start,stop", [(0, 64), (64, 136), (128, 200)])
def test_a_slice_of_w_along_n_gives_those_columns(target, trans_w, start, stop, transposed, block_m):
    """How a large product is made a few columns at a time."""
    p = Problem(Case(70, 2, 4, 200, 40, block_m=block_m), target.device, target.dtype)
    w = p.w_down if trans_w else p.w_down.mT.contiguous()
    w = w.mT.contiguous().mT if transposed else w
    columns = slice(start, stop)
    part = run(p, p.a, w[:, columns] if trans_w else w[:, :, columns], p.bias_down[:, columns], trans_w)
    arguments = (p.a, w, p.bias_down)
    truth = helpers.grouped_gemm(p, *helpers.doubled(*arguments), trans_w)[:, columns]
    assert_close(part[: p.kept], truth, helpers.grouped_gemm(p, *arguments, trans_w)[:, columns])


@pytest.mark.parametrize("trans_w", [True, False], ids=["w-ENC", "w-ECN"])
def test_strided_inputs(target, trans_w):
    p = Problem(Case(50, 2, 4, 72, 40), target.device, target.dtype)
    w = p.w_down if trans_w else p.w_down.mT.contiguous()
    expected = run(p, p.a, w, None, trans_w)[: p.kept]
    wide = torch.full((p.a.shape[0], 136), torch.nan, device=target.device, dtype=target.dtype)
    wide[:, 64:104] = p.a
    for a, other in (
        (wide[:, 64:104], w),
        (p.a.T.contiguous().T, w),
        (p.a, w.mT.contiguous().mT),
        (p.a, torch.stack([w] * 2, 1)[:, 0]),
    ):
        assert_close(run(p, a, other, None, trans_w)[: p.kept], expected.double(), expected)


def test_rerun_is_bitwise_equal(target):
    p = Problem(CASES[4], target.device, target.dtype)
    first, second = (run(p, p.a, p.w_down, p.bias_down, True)[: p.kept] for _ in range(2))
    assert bitwise_equal(first, second)
