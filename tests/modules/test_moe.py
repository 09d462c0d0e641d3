import copy
import subprocess
import sys

import pytest
import torch

from moe_kernels.modules import MoE
from tests.helpers import GATED, NUMBERS, activate, naive_moe, relative_l2

D, I, S, E, K = 16, 24, 40, 6, 2  # noqa: E741


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(D,), (9, D), (2, 5, D), (0, D)])
@pytest.mark.parametrize("shared", [None, S])
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "geglu_tanh", *NUMBERS])
def test_against_a_naive_loop(activation, shared, shape):
    alpha, limit = NUMBERS.get(activation, (None, None))
    moe = MoE(D, I, E, K, activation=activation, alpha=alpha, limit=limit, shared_intermediate_size=shared)
    x = torch.randn(shape, requires_grad=True)
    flat = x.view(-1, D)
    weights, indices, _ = moe.router(flat)
    up = "gate_up_proj" if activation in GATED else "up_proj"
    truth = naive_moe(flat, weights, indices, getattr(moe.experts, up), moe.experts.down_proj, activation)
    if shared:
        h = flat @ getattr(moe.shared_expert, up).weight.T
        truth = truth + activate(h, activation) @ moe.shared_expert.down_proj.weight.T
    out = moe(x)
    assert out.shape == x.shape
    assert relative_l2(out, truth.view(shape)) < 1e-5
    leaves = (x, *moe.parameters())
    wanted = torch.randn(shape)
    gradients = [
        torch.autograd.grad((y.view(shape) * wanted).sum(), leaves, materialize_grads=True) for y in (out, truth)
    ]
    for a, b in zip(*gradients, strict=True):
        assert relative_l2(a, b) < 1e-5


def test_state_dict():
    moe = MoE(D, I, E, K, shared_intermediate_size=S, scoring="sigmoid", selection_bias=True)
    assert set(moe.state_dict()) == {
        "router.weight",
        "router.selection_bias",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_expert.gate_up_proj.weight",
        "shared_expert.down_proj.weight",
    }
    assert "shared_expert.up_proj.weight" in MoE(D, I, E, K, activation="silu", shared_intermediate_size=S).state_dict()
    clone = MoE(D, I, E, K, shared_intermediate_size=S, scoring="sigmoid", selection_bias=True)
    clone.load_state_dict(moe.state_dict())
    x = torch.randn(3, D)
    assert torch.equal(clone(x), moe(x)) and torch.equal(copy.deepcopy(moe)(x), moe(x))


def test_dtypes():
    moe = MoE(D, I, E, K, shared_intermediate_size=S)
    x = torch.randn(7, D)
    expected = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(x)
    assert out.dtype == torch.float32 and relative_l2(out, expected) < 2e-2
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())
    low = moe.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16


def test_trains():
    moe = MoE(D, I, E, K, shared_intermediate_size=S, recompute="pre_activation")
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    x = torch.randn(64, D)
    target = torch.randn(64, D).mul(0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (moe(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiles():
    moe = MoE(D, I, E, K, shared_intermediate_size=S)
    x = torch.randn(6, D)
    expected = torch.autograd.grad(moe(x).sum(), list(moe.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x).sum(), list(moe.parameters())), expected):
        torch.testing.assert_close(a, b)


def test_bad_arguments():
    with pytest.raises(ValueError, match="MoE: shared_intermediate_size must be a positive integer, got 0"):
        MoE(D, I, E, K, shared_intermediate_size=0)
    with pytest.raises(ValueError, match="TopKRouter: top_k"):
        MoE(D, I, E, 7)
    with pytest.raises(TypeError, match="temperature"):
        MoE(D, I, E, K, temperature=2)
    with pytest.raises(ValueError, match=r"MoE: x must be \[\.\.\., 16\], got \[3, 8\]"):
        MoE(D, I, E, K)(torch.randn(3, 8))


def test_imports_without_hugging_face():
    code = "import sys, moe_kernels.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
