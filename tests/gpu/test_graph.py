"""CUDA-graph capture: forward, forward with backward, whole blocks; a replay sees new tokens and a new routing."""

import pytest
import torch

from moe_kernels.bench.measure import capture
from moe_kernels.functional import moe_experts, routing_plan, topk_route
from moe_kernels.modules import MoE
from tests.helpers import Case, Problem, bitwise_equal

pytestmark = pytest.mark.gpu

CASE = Case(300, 4, 16, 256, 128)
OTHER = [CASE._replace(routing="empty"), CASE._replace(routing="all_to_one"), CASE._replace(routing="sentinels")]
NAMES = ("x", "weights", "w_gate_up", "w_down")
BOTH = pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])


def loaded(inputs, indices):
    """New values in the old memory, again and again."""
    for case in (CASE, *OTHER):
        other = Problem(case, "cuda", torch.bfloat16)
        with torch.no_grad():
            for name, tensor in zip(NAMES, inputs):
                tensor.copy_(getattr(other, name))
            indices.copy_(other.indices)
        yield


def replays_equal_eager(function, loads):
    graph, captured = capture(function)
    for _ in loads:
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

    replays_equal_eager(forward, loaded(inputs, indices))


@BOTH
def test_forward_and_backward(recompute):
    p = Problem(CASE, "cuda", torch.bfloat16)
    inputs, indices = [getattr(p, name).clone().requires_grad_() for name in NAMES], p.indices.clone()

    def step():
        x, weights, w_gate_up, w_down = inputs
        plan = routing_plan(indices, CASE.E)
        out = moe_experts(x, weights, plan, w_gate_up, w_down, recompute=recompute)
        return [out.detach(), *torch.autograd.grad(out, inputs, p.d_out)]

    replays_equal_eager(step, loaded(inputs, indices))


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


@BOTH
def test_a_whole_block(recompute):
    """Router, experts, shared expert and their sum: new tokens choose other experts."""
    torch.manual_seed(0)
    where = {"device": "cuda", "dtype": torch.bfloat16}
    moe = MoE(CASE.D, CASE.I, CASE.E, CASE.K, shared_intermediate_size=CASE.I, recompute=recompute, **where)
    x, d_out = (torch.randn(CASE.T, CASE.D, **where) for _ in range(2))
    leaves = [x.requires_grad_(), *moe.parameters()]

    def step():
        out = moe(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    def loads():
        for rows in (CASE.T, CASE.T, 1):  # of one token alone all go to the same experts
            with torch.no_grad():
                x.copy_(torch.randn(rows, CASE.D, **where))
            yield

    replays_equal_eager(step, loads())
