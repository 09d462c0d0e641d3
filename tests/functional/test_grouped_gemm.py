import pytest
import torch

from moe_kernels.functional import grouped_gemm
from tests import helpers
from tests.helpers import Case, Problem

CASES = [
    Case(13, 2, 4, 8, 5, block_m=16),
    Case(1, 1, 1, 8, 8, block_m=16),
    Case(0, 2, 3, 8, 8, block_m=16),
    Case(9, 3, 5, 7, 8, routing="sentinels", block_m=16),
    Case(8, 2, 4, 8, 8, routing="all_to_one", block_m=16),
    Case(6, 2, 4, 8, 8, routing="all_dropped", block_m=16),
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)
ORIENTATION = pytest.mark.parametrize("trans_w", [True, False], ids=["w-ENC", "w-ECN"])


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


@TABLE
@ORIENTATION
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_gradient(case, trans_w, bias):
    p = Problem(case, dtype=torch.float64)
    w = leaf(p.w_down if trans_w else p.w_down.mT.contiguous())
    inputs = (leaf(p.a.nan_to_num()), w, *([leaf(p.bias_down)] if bias else []))

    def kept_rows(a, w, b=None):
        return grouped_gemm(a, w, p.plan, bias_EN=b, trans_w=trans_w)[: p.kept]

    truth = helpers.grouped_gemm(p, p.a, w, p.bias_down if bias else None, trans_w)
    torch.testing.assert_close(kept_rows(*inputs), truth, rtol=1e-12, atol=1e-12)
    if p.kept:
        assert torch.autograd.gradcheck(kept_rows, inputs)


@TABLE
@ORIENTATION
def test_rows_without_an_expert_do_not_leak(case, trans_w):
    """Rows past the last expert hold NaN, in and out; their gradient is zero and they reach no weight."""
    p = Problem(case)
    a, w, b = leaf(p.a), leaf(p.w_down if trans_w else p.w_down.mT.contiguous()), leaf(p.bias_down)
    y = grouped_gemm(a, w, p.plan, bias_EN=b, trans_w=trans_w)
    y.backward(torch.ones_like(y).expand_as(y))
    assert a.grad.isfinite().all() and (a.grad[p.kept :] == 0).all()
    empty = p.plan.tokens_per_expert_E == 0
    for name, grad in (("w", w.grad), ("bias", b.grad)):
        assert grad.isfinite().all() and (grad[empty] == 0).all(), name


@pytest.mark.parametrize("frozen", ["a", "w", "bias", "w and bias"])
def test_frozen_inputs_cost_nothing(frozen, op_counter):
    p = Problem(CASES[0])
    inputs = {"a": leaf(p.a), "w": leaf(p.w_down), "bias": leaf(p.bias_down)}
    for name in frozen.split(" and "):
        inputs[name].requires_grad_(False)
    y = grouped_gemm(inputs["a"], inputs["w"], p.plan, bias_EN=inputs["bias"])
    with op_counter:
        y.backward(torch.ones_like(y))
    for name, tensor in inputs.items():
        assert (tensor.grad is None) == (name in frozen.split(" and ")), name
    assert op_counter.calls["grouped_wgrad"] == (0 if frozen == "w and bias" else 1)
    assert op_counter.calls["grouped_gemm"] == (0 if frozen == "a" else 1)


@ORIENTATION
def test_training_the_bias_alone(trans_w, op_counter):
    """The sums of rows, not the weight's gradient."""
    p = Problem(Case(9, 3, 5, 32, 24, routing="sentinels", block_m=16), dtype=torch.float64)
    w, b = (p.w_down if trans_w else p.w_down.mT.contiguous()), leaf(p.bias_down)
    y = grouped_gemm(p.a, w, p.plan, bias_EN=b, trans_w=trans_w)
    with op_counter:
        y.backward(torch.ones_like(y))
    assert op_counter.calls == {"grouped_wgrad": 1}
    assert op_counter.shapes["grouped_wgrad"] == [[p.case.E, p.case.D, 0]]
    expected = p.plan.tokens_per_expert_E[:, None].double().expand_as(b)
    torch.testing.assert_close(b.grad, expected, rtol=1e-12, atol=1e-12)
