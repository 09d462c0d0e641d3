"""accumulate_grad under torch.compile: one graph while ``.grad`` is None, one that adds to it, copies nothing."""

import ast
import math
import re
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from moe_kernels import use_backend
from moe_kernels.functional import moe_experts, topk_route
from tests.helpers import Case, Problem, assert_close

CASE = Case(24, 2, 4, 16, 8)
WEIGHTS = ("w_gate_up", "w_down")
NAMES = ("x", *WEIGHTS, "bias_gate_up", "bias_down")


@pytest.fixture(autouse=True)
def _reference():
    torch._dynamo.reset()
    with use_backend("reference"):
        yield


def layer(x, w_gate_up, w_down, bias_gate_up, bias_down, accumulate_grad=True, recompute=None):
    weights, indices = topk_route(x[:, : w_down.shape[0]] * 2, 2, renormalize=True)
    return moe_experts(
        x,
        weights,
        indices,
        w_gate_up,
        w_down,
        bias_gate_up_E2I=bias_gate_up,
        bias_down_ED=bias_down,
        accumulate_grad=accumulate_grad,
        recompute=recompute,
    )


def transposed_layer(x, w_gate_up, w_down, *rest):
    return layer(x, w_gate_up.mT, w_down.mT, *rest)


def leaves(p):
    return {name: getattr(p, name).detach().clone().requires_grad_() for name in NAMES}


def compiled(function=layer, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def expected(p, steps, recompute=None):
    inputs = leaves(p)
    for _ in range(steps):
        layer(*inputs.values(), False, recompute).backward(p.d_out)
    return inputs


def assert_grads(inputs, truth):
    for name, tensor in inputs.items():
        assert_close(tensor.grad, truth[name].grad.double(), what=name)


@pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])
def test_steps_and_zero_grad(recompute, op_counter):
    p = Problem(CASE)
    inputs, (step, counter) = leaves(p), compiled()
    for _ in range(4):
        step(*inputs.values(), True, recompute).backward(p.d_out)
    assert_grads(inputs, expected(p, 4, recompute))
    assert counter.frame_count == 2, "without and with .grad"
    optimizer = torch.optim.SGD(inputs.values(), 0.0)
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none)
        for _ in range(2):
            out = step(*inputs.values(), True, recompute)
            with op_counter:
                out.backward(p.d_out)
        assert_grads(inputs, expected(p, 2, recompute))
    assert counter.frame_count == 2
    assert op_counter.calls["add_to_grad_"] == 2 * (1 + 2)


@pytest.mark.parametrize("between", ["nothing", "none", "zero", "other", "backward"])
def test_what_happens_between_forward_and_backward(between):
    """The graph looks up ``.grad`` when it adds to it."""
    p = Problem(CASE)
    inputs, (step, _) = leaves(p), compiled()
    for _ in range(2):
        step(*inputs.values()).backward(p.d_out)
    out, steps = step(*inputs.values()), 1
    match between:
        case "nothing":
            steps = 3
        case "none" | "zero":
            torch.optim.SGD(inputs.values(), 0.0).zero_grad(between == "none")
        case "other":
            for tensor in inputs.values():
                tensor.grad = torch.zeros_like(tensor)
        case "backward":
            step(*inputs.values()).backward(p.d_out)
            steps = 4
    out.backward(p.d_out)
    assert_grads(inputs, expected(p, steps))


@torch._functorch.config.patch(donated_buffer=False)  # else a compiled graph is used up by its backward
def test_two_uses_in_one_backward_and_two_backwards():
    p = Problem(CASE)
    inputs, (step, _) = leaves(p), compiled()
    for _ in range(2):
        step(*inputs.values()).backward(p.d_out)
    (step(*inputs.values()) + step(*inputs.values())).backward(p.d_out)
    out = step(*inputs.values())
    for keep in (True, False):
        out.backward(p.d_out, retain_graph=keep)
    assert_grads(inputs, expected(p, 6))


def test_a_grad_of_another_layout_is_added_to_as_autograd_does():
    p = Problem(CASE)
    inputs, (step, _) = leaves(p), compiled()
    step(*inputs.values()).backward(p.d_out)
    inputs["w_down"].grad = inputs["w_down"].grad.mT.contiguous().mT
    step(*inputs.values()).backward(p.d_out)
    assert_grads(inputs, expected(p, 2))


@pytest.mark.parametrize("asked", ["x", "all", "inputs"])
def test_a_backward_that_does_not_accumulate_is_refused(asked):
    """Rather than adding to a ``.grad`` that nobody wanted changed."""
    p = Problem(CASE)
    inputs, (step, _) = leaves(p), compiled()
    for _ in range(2):
        step(*inputs.values()).backward(p.d_out)
    out = step(*inputs.values())
    before = [inputs[name].grad.clone() for name in WEIGHTS]
    with pytest.raises(RuntimeError, match=r"accumulate_grad=False|not to have been used in the graph"):
        if asked == "inputs":
            out.backward(p.d_out, inputs=[inputs["x"]])
        else:
            torch.autograd.grad(out, [inputs["x"]] if asked == "x" else list(inputs.values()), p.d_out)
    assert all(torch.equal(inputs[name].grad, old) for name, old in zip(WEIGHTS, before))


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_are_refused(hook):
    p = Problem(CASE)
    inputs, (step, _) = leaves(p), compiled()
    for _ in range(2):
        step(*inputs.values()).backward(p.d_out)
    getattr(inputs["w_gate_up"], hook)(lambda tensor: None)
    with pytest.raises(RuntimeError, match=r"adds to \.grad itself, but a weight has .*hooks"):
        step(*inputs.values()).backward(p.d_out)


@pytest.mark.parametrize(
    "function,frozen,reason",
    [
        (transposed_layer, None, "a weight is no parameter as it is stored"),
        (lambda x, w, *rest: layer(x, w * 1, *rest), None, "a weight is no parameter as it is stored"),
        (layer, "x", "the experts' input needs no gradient"),
    ],
    ids=["transposed", "made", "input"],
)
def test_where_autograd_gets_the_gradient(function, frozen, reason):
    p = Problem(CASE)
    inputs, (step, _) = leaves(p), compiled(function)
    if function is transposed_layer:
        inputs |= {name: inputs[name].detach().mT.contiguous().requires_grad_() for name in WEIGHTS}
    if frozen:
        inputs[frozen].requires_grad_(False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            step(*inputs.values()).backward(p.d_out)
    assert any(reason in str(warning.message) for warning in said)
    truth = expected(p, 3)
    for name in WEIGHTS:
        grad = inputs[name].grad.mT if function is transposed_layer else inputs[name].grad
        assert_close(grad, truth[name].grad.double(), what=name)


def test_dynamic_token_count_compiles_once():
    inputs, (_, counter) = leaves(Problem(CASE)), compiled()
    step = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for i, T in enumerate((24, 33, 40, 57)):
        p = Problem(CASE._replace(T=T))
        inputs["x"] = p.x.detach().clone().requires_grad_()
        step(*inputs.values()).backward(p.d_out)
        assert inputs["x"].grad is not None and i < 4
    assert counter.frame_count <= 2 + 2  # with and without .grad, and block_m follows the rows an expert


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
@pytest.mark.parametrize("recompute", [None, "pre_activation"], ids=["save-h", "recompute"])
def test_inductor_makes_no_gradient_of_the_weights_size(recompute):
    """Nor copies of rows or weights; dW_down comes first, and Y and dX rows in chunks."""
    p = Problem(Case(24, 2, 2, 512, 128))
    inputs = leaves(p)
    step = torch.compile(layer, fullgraph=True)
    step(*inputs.values(), True, recompute).backward(p.d_out)

    def second():
        step(*inputs.values(), True, recompute).backward(p.d_out)

    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(second)
    assert_grads(inputs, expected(p, 2, recompute))
    assert len(codes) == 2
    for code in codes:
        call = code[code.index("def call(") : code.index("return (", code.index("def call("))]
        shapes = [ast.literal_eval(shape) for shape in re.findall(r"= empty_strided_cpu\((\([^)]*\))", call)]
        assert shapes and max(map(math.prod, shapes)) <= p.x.numel()
        assert not re.search(r"clone|copy_", call)
    order = re.findall(r"ops\.moe_kernels\.(add_to_grad_|grouped_gemm|d_activation)\.default\(", call)
    assert order == ["d_activation", "add_to_grad_", "grouped_gemm", "grouped_gemm", "add_to_grad_"], "dX in two chunks"
