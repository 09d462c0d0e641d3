"""A double backward is refused by every differentiable function, on every backend: never a graph silently cut."""

import pytest
import torch

from moe_kernels.functional import grouped_gemm, moe_experts, permute, topk_route, unpermute
from tests.helpers import Case, Problem

OP = "permute"  # what `target` asks about; a backend without the other ops leaves them to the next one

# function and variant -> (the call, with a Problem and the tensors it is differentiated by, and their names)
CALLS = {
    "permute": (lambda p, x: permute(x, p.plan), "x"),
    "unpermute": (lambda p, y: unpermute(y, p.plan), "y"),
    "unpermute weighted": (lambda p, y, weights: unpermute(y, p.plan, weights), "y", "weights"),
    "grouped_gemm": (lambda p, a, w: grouped_gemm(a, w, p.plan), "a", "w_down"),
    "grouped_gemm bias": (lambda p, a, w, b: grouped_gemm(a, w, p.plan, bias_EN=b), "a", "w_down", "bias_down"),
    "topk_route": (lambda p, logits: topk_route(logits, 2, renormalize=True)[0], "x"),
    "moe_experts": (lambda p, x, s, up, w: moe_experts(x, s, p.plan, up, w), "x", "weights", "w_gate_up", "w_down"),
}
TWICE = [name for name in CALLS if name != "moe_experts"]  # that one consumes its graph


def ids(name):
    return name.replace(" ", "-")


@pytest.mark.parametrize("call", CALLS, ids=ids)
@pytest.mark.parametrize("only", [0, -1], ids=["first", "last"])
def test_create_graph(call, only, target):
    p = Problem(Case(6, 2, 4, 16, 16, block_m=16), target.device, target.dtype)
    function, *names = CALLS[call]
    inputs = [getattr(p, name).detach().clone() for name in names]
    wanted = inputs[only].requires_grad_()  # the first or the last alone: no path around the refusal
    out = function(p, *inputs)
    name = call.partition(" ")[0]
    with pytest.raises(RuntimeError, match=rf"{name}: .*double backward.* not supported"):
        torch.autograd.grad(out.sum(), wanted, create_graph=True)


@pytest.mark.parametrize("call", TWICE, ids=ids)
def test_the_graph_is_still_good_afterwards(call, target):
    """Nothing was consumed on the way to the error."""
    p = Problem(Case(6, 2, 4, 16, 16, block_m=16), target.device, target.dtype)
    function, *names = CALLS[call]
    results = []
    for refused in (False, True):
        inputs = [getattr(p, name).detach().clone().requires_grad_() for name in names]
        out = function(p, *inputs)
        if refused:
            with pytest.raises(RuntimeError, match="double backward"):
                torch.autograd.grad(out.sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(out.sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results))
