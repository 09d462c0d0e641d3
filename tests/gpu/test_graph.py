"""CUDA-graph capture: forward, and forward with backward; a replay sees new tokens and a new routing."""

import pytest
import torch

from moe_kernels.bench.measure import capture
from moe_kernels.functional import moe_experts, routing_plan, topk_route
from tests.helpers import Case, Problem, bitwise_equal

pytestmark = pytest.mark.gpu

CASE = Case(300, 4, 16, 256, 128)
OTHER = [CASE._replace(routing="empty"), CASE._replace(routing="all_to_one"), CASE._replace(routing="sentinels")]
NAMES = ("x", "weights", "w_gate_up", "w_down")
BOTH = pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])


def load(p, inputs, indices, other):
    """New values in the old memory."""
    with torch.no_grad():
        for name, tensor in zip(NAMES, inputs):
            tensor.copy_(getattr(other, name))
        indices.copy_(other.indices)


def replays_equal_eager(function, p, inputs, indices):
    graph, captured = capture(function)
    for case in (CASE, *OTHER):
        load(p, inputs, indices, Problem(case, "cuda", torch.bfloat16))
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        for ours, eager in zip(captured, function()):
            assert bitwise_equal(ours, eager)


def test_forward():
    p = Problem(CASE, "cuda", torch.bfloat16)
    inputs, indices = [getattr(p, name).clone() for name in NAMES], p.indices.clone()

    def forward():
        x, weights, w_gate_up, w_down = inputs
        return [moe_experts(x, weights, routing_plan(indices, CASE.E), w_gate_up, w_down)]

    replays_equal_eager(forward, p, inputs, indices)


@BOTH
def test_forward_and_backward(recompute):
    p = Problem(CASE, "cuda", torch.bfloat16)
    inputs, indices = [getattr(p, name).clone().requires_grad_() for name in NAMES], p.indices.clone()

    def step():
        x, weights, w_gate_up, w_down = inputs
        plan = routing_plan(indices, CASE.E)
        out = moe_experts(x, weights, plan, w_gate_up, w_down, recompute=recompute)
        return [out.detach(), *torch.autograd.grad(out, inputs, p.d_out)]

    replays_equal_eager(step, p, inputs, indices)


def test_with_the_router():
    p = Problem(CASE, "cuda", torch.bfloat16)
    logits = torch.randn(CASE.T, CASE.E, device="cuda")

    def forward():
        weights, indices = topk_route(logits, CASE.K, renormalize=True)
        return [moe_experts(p.x, weights, routing_plan(indices, CASE.E), p.w_gate_up, p.w_down)]

    graph, (out,) = capture(forward)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert bitwise_equal(out, forward()[0])
