"""Token counts change every step: after one step, no other count may compile a kernel again."""

import pytest
import torch

from moe_kernels.functional import moe_experts, permute, routing_plan, topk_route, unpermute
from tests.helpers import Case, Problem

pytestmark = pytest.mark.gpu

CASE = Case(384, 4, 16, 128, 64)
# One, odd, multiples of 16 and not, above and below the warm-up
TOKENS = (1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 127, 128, 200, 255, 300, 383, 385, 512, 777, 1024)


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels Triton is about to compile or to read from its disk cache."""
    triton = pytest.importorskip("triton")
    names = []

    def hook(*args, fn, **kwargs):
        names.append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    return names


def train_step(T, p, routing):
    x = torch.randn(T, CASE.D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights, indices = topk_route(torch.randn(T, CASE.E, device="cuda"), CASE.K, renormalize=True)
    if routing == "sentinels":
        indices = torch.where(indices % 3 == 0, -1, indices)
    plan = routing_plan(indices, CASE.E, block_m=64)  # by default block_m follows T: a kernel for each of four values
    weights = weights.detach().requires_grad_()
    w_gate_up, w_down = p.w_gate_up.detach().requires_grad_(), p.w_down.detach().requires_grad_()
    out = moe_experts(x, weights, plan, w_gate_up, w_down)
    out = out + unpermute(permute(x, plan), plan, weights)
    out.sum().backward()


@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
def test_no_compilation_after_the_first_step(compiled, routing):
    p = Problem(CASE, "cuda", torch.bfloat16)
    train_step(CASE.T, p, routing)
    warm_up = list(compiled)
    compiled.clear()
    for T in TOKENS:
        train_step(T, p, routing)
        assert compiled == [], f"T = {T} compiled again"
    assert routing != "uniform" or warm_up, "the hook saw nothing: this test proves nothing"


def test_the_numbers_of_an_activation_compile_nothing(compiled):
    p = Problem(CASE, "cuda", torch.bfloat16)

    def run(alpha, limit):
        w_gate_up = p.w_gate_up.detach().requires_grad_()
        numbers = {"activation": "swiglu_oai", "alpha": alpha, "limit": limit}
        moe_experts(p.x, p.weights, p.plan, w_gate_up, p.w_down, **numbers).sum().backward()

    run(1.702, 7.0)
    assert compiled, "the hook saw nothing: this test proves nothing"
    compiled.clear()
    for alpha, limit in ((1.0, 7.0), (1.702, 1.0), (0.5, 16.0)):
        run(alpha, limit)
        assert compiled == []
