"""moe_experts(..., residual_TD=...): the sum of a shared expert, made where the experts' rows are summed."""

import pytest
import torch

from moe_kernels.functional import _row_product, moe_experts, routing_plan
from tests.helpers import relative_l2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
T, K, E, D, I = 70, 3, 8, 512, 64  # noqa: E741


def problem(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    indices = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].contiguous().to(device)
    leaves = [normal(T, D), normal(T, K), normal(E, 2 * I, D, scale=D**-0.5), normal(E, D, I, scale=I**-0.5)]
    return leaves, indices, normal(T, D), torch.randn(T, D, generator=generator).to(device, dtype)


def run(leaves, indices, residual, d_out, inside, **options):
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in (*leaves, residual)]
    x, weights, w_up, w_down, residual = leaves
    out = moe_experts(x, weights, indices, w_up, w_down, residual_TD=residual if inside else None, **options)
    out = out if inside else out + residual
    out.backward(d_out)
    return [out, *(t.grad for t in leaves if t.requires_grad)]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("recompute", [None, "pre_activation"])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_an_addition_outside(device, recompute, chunked, monkeypatch):
    if chunked:  # two column chunks
        monkeypatch.setattr(_row_product, "_ROW_BUFFER_BYTES", 1)
        monkeypatch.setattr(_row_product, "_chunk_columns", lambda *_: 256)
    arguments = problem(device)
    actual = run(*arguments, inside=True, recompute=recompute)
    for a, b in zip(actual, run(*arguments, inside=False, recompute=recompute), strict=True):
        assert relative_l2(a, b) < 1e-6
    assert torch.equal(actual[-1], arguments[-1]), "its gradient is that of the output"


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_experts(device):
    leaves, indices, residual, d_out = problem(device)
    (_, gradient) = run([t.requires_grad_(False) for t in leaves], indices, residual, d_out, inside=True)
    assert torch.equal(gradient, d_out)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_gradient_and_few_tokens(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (x, weights, w_up, w_down), indices, residual, _ = problem(device, dtype)
    with torch.no_grad():
        for tokens in (1, T):  # one token: the op that makes no plan, where there is one
            given = x[:tokens], weights[:tokens], indices[:tokens], w_up, w_down
            actual = moe_experts(*given, residual_TD=residual[:tokens])
            assert relative_l2(actual, moe_experts(*given) + residual[:tokens]) < (1e-6 if device == "cpu" else 1e-2)
            actual = moe_experts(*given[:2], routing_plan(given[2], E), w_up, w_down, residual_TD=residual[:tokens])
            assert relative_l2(actual, moe_experts(*given) + residual[:tokens]) < (1e-6 if device == "cpu" else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_is_rounded_once(device):
    arguments = problem(device)
    truth = run(*arguments, inside=False)[0]
    half = [[t.bfloat16() for t in arguments[0]], arguments[1], *(t.bfloat16() for t in arguments[2:])]
    inside, outside = (relative_l2(run(*half, inside=inside)[0], truth) for inside in (True, False))
    assert inside <= outside * 1.02


def test_compile():
    leaves, indices, residual, d_out = problem("cpu")
    expected = run(leaves, indices, residual, d_out, inside=True)

    def call(x, weights, indices, w_up, w_down, residual):
        return moe_experts(x, weights, indices, w_up, w_down, residual_TD=residual)

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves[:2], indices, *leaves[2:], residual)
    out.backward(d_out)
    for actual, truth in zip([out, *(t.grad for t in (*leaves, residual))], expected, strict=True):
        assert relative_l2(actual, truth) < 1e-6


@pytest.mark.parametrize(
    "residual, error, message",
    [
        (torch.zeros(T, D - 1), ValueError, r"residual must be shaped like x \[70, 512\]"),
        (torch.zeros(T, D, dtype=torch.int64), TypeError, "residual must be a floating-point tensor"),
        (1.0, TypeError, "residual must be a floating-point tensor"),
    ],
)
def test_bad_residual(residual, error, message):
    (x, weights, w_up, w_down), indices, _, _ = problem("cpu")
    with pytest.raises(error, match=message):
        moe_experts(x, weights, indices, w_up, w_down, residual_TD=residual)
