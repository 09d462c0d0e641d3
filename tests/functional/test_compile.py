"""torch.compile of the functional layer: one graph, forward and backward equal to eager, few recompilations."""

import ast
import math
import re
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from moe_kernels import use_backend
from moe_kernels.functional import moe_experts, permute, routing_plan, topk_route, unpermute
from tests.helpers import Case, Problem, assert_close

NAMES = ("x", "w_gate_up", "w_down", "bias_gate_up", "bias_down")
CASES = [Case(24, 2, 4, 16, 8), Case(24, 2, 4, 16, 8, "relu2"), Case(24, 2, 6, 16, 8, routing="empty")]


@pytest.fixture(autouse=True)
def _reference():
    torch._dynamo.reset()
    with use_backend("reference"):
        yield


@pytest.fixture
def _poisoned():
    """Not here: dynamo would trace the fixture's wrappers."""


def layer(x, logits, w_gate_up, w_down, bias_gate_up, bias_down, activation, recompute):
    weights, indices = topk_route(logits, 2, renormalize=True)
    return moe_experts(
        x,
        weights,
        routing_plan(indices, w_down.shape[0]),
        w_gate_up,
        w_down,
        activation=activation,
        bias_gate_up_E2I=bias_gate_up,
        bias_down_ED=bias_down,
        recompute=recompute,
    )


def leaves(p):
    tensors = [getattr(p, name) for name in NAMES]
    tensors.insert(1, p.x[:, : p.case.E] * 2)
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_equal_eager(case, recompute):
    p = Problem(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        inputs = leaves(p)
        out = function(*inputs, case.activation, recompute)
        results.append([out, *torch.autograd.grad(out, inputs, p.d_out)])
    for eager, ours in zip(*results):
        assert_close(ours, eager.double())


@pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])
def test_two_backwards_over_a_compiled_graph(recompute, op_counter):
    """The compiled backward must not write over what it saved."""
    p = Problem(CASES[0])
    inputs = leaves(p)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs, "swiglu", recompute)
    with op_counter:
        first = torch.autograd.grad(out, inputs, p.d_out, retain_graph=True)
        second = torch.autograd.grad(out, inputs, p.d_out)
    assert op_counter.calls["d_activation"] == 2 and op_counter.calls["d_activation_"] == 0
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_dynamic_token_count_compiles_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T in (24, 33, 40, 57):
        p = Problem(CASES[0]._replace(T=T))
        inputs = leaves(p)
        for ours, eager in zip(
            *(
                [out, *torch.autograd.grad(out, inputs, p.d_out)]
                for out in (compiled(*inputs, "swiglu", None), layer(*inputs, "swiglu", None))
            )
        ):
            assert_close(ours, eager.double())
    # block_m follows the rows per expert, a power of two from 16 to 128: one graph for each that turned up
    assert counter.frame_count <= 3


def test_permute_and_unpermute():
    def round_trip(x, indices):
        plan = routing_plan(indices, 4)
        return unpermute(permute(x, plan) * 2, plan)

    p = Problem(CASES[0])
    x = p.x.detach().clone().requires_grad_()
    out = torch.compile(round_trip, fullgraph=True, backend="aot_eager")(x, p.indices)
    assert_close(out, (p.x * 4).double())
    out.backward(p.d_out)
    assert_close(x.grad, (p.d_out * 4).double())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
@pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])
def test_inductor_copies_neither_rows_nor_weights(recompute):
    """What it allocates beside the outputs of our ops is no larger than x; dW_down comes last, when dH is gone."""
    p = Problem(Case(24, 2, 2, 16, 64))
    inputs = leaves(p)

    def step(function):
        out = function(*inputs, "swiglu", recompute)
        return [out, *torch.autograd.grad(out, inputs, p.d_out)]

    with torch._inductor.config.patch(force_disable_caches=True):
        results, codes = run_and_get_code(step, torch.compile(layer, fullgraph=True))
    for ours, eager in zip(results, step(layer), strict=True):
        assert_close(ours, eager.double())
    assert len(codes) == 2
    for code in codes:
        call = code[code.index("def call(") : code.index("return (", code.index("def call("))]
        shapes = [ast.literal_eval(shape) for shape in re.findall(r"= empty_strided_cpu\((\([^)]*\))", call)]
        assert shapes and max(map(math.prod, shapes)) <= p.x.numel()
        assert not re.search(r"clone|copy_|as_strided", call)
    assert re.findall(r"grouped_wgrad.*'([lr]hs)'", call) == ["rhs", "lhs"]
