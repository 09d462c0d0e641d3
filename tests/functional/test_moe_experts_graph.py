"""moe_experts and the autograd graph: two backwards over one graph are right, or a clear error; never silently wrong.

The backward writes over what the forward saved, so every way to reach a saved tensor twice is walked here.
"""

import contextlib
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_kernels import use_backend
from tests.functional.experts import BOTH, NAMES, SMALL, gradients, inputs_of, naive, run
from tests.helpers import Case, Problem, assert_close, bitwise_equal

DROPPING = Case(9, 3, 5, 7, 6, routing="sentinels", block_m=16)
ONCE = "a second backward over the same graph"


@pytest.fixture(autouse=True)
def _reference():
    """What is tested here is what surrounds the ops."""
    with use_backend("reference"):
        yield


@BOTH
def test_second_backward_over_the_graph(recompute):
    p = Problem(SMALL)
    inputs = inputs_of(p)
    out = run(p, inputs, recompute)
    first = gradients(out, inputs, p.d_out, retain_graph=True)
    if recompute is None:
        with pytest.raises(RuntimeError, match=ONCE):
            gradients(out, inputs, p.d_out)
    else:
        second = gradients(out, inputs, p.d_out)
        assert all(bitwise_equal(first[name], second[name]) for name in inputs)


def test_backward_through_a_freed_graph_is_an_error():
    p = Problem(SMALL)
    inputs = inputs_of(p)
    out = run(p, inputs)
    out.backward(p.d_out)
    with pytest.raises(RuntimeError):
        out.backward(p.d_out)


def keep(tensor):
    return tensor


class CopyOnce:
    """Hooks that copy when packing and hand back that very copy each time."""

    pack, unpack = staticmethod(torch.Tensor.clone), staticmethod(keep)


class CopyTwice:
    """Hooks that copy in both directions, as offloading to another device does."""

    pack, unpack = staticmethod(torch.Tensor.clone), staticmethod(torch.Tensor.clone)


class Identity:
    pack, unpack = staticmethod(keep), staticmethod(keep)


@pytest.mark.parametrize("hooks,twice", [(Identity, False), (CopyOnce, False), (CopyTwice, True)])
def test_second_backward_under_saved_tensor_hooks(hooks, twice):
    """Hooks bypass autograd's version counter; the library must notice for itself, and only when H really is gone."""
    p = Problem(SMALL)
    plain, inputs = inputs_of(p), inputs_of(p)
    expected = gradients(run(p, plain), plain, p.d_out)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        out = run(p, inputs)
    first = gradients(out, inputs, p.d_out, retain_graph=True)
    assert all(bitwise_equal(first[name], expected[name]) for name in inputs)
    if not twice:
        with pytest.raises(RuntimeError, match=ONCE):
            gradients(out, inputs, p.d_out)
    else:
        second = gradients(out, inputs, p.d_out)
        assert all(bitwise_equal(second[name], expected[name]) for name in inputs)


def test_offload_to_the_cpu():
    p = Problem(SMALL)
    plain, inputs = inputs_of(p), inputs_of(p)
    expected = gradients(run(p, plain), plain, p.d_out)
    with torch.autograd.graph.save_on_cpu():
        out = run(p, inputs)
    got = gradients(out, inputs, p.d_out, retain_graph=True)
    assert all(bitwise_equal(got[name], expected[name]) for name in inputs)
    with contextlib.suppress(RuntimeError):  # on the CPU save_on_cpu copies nothing: then the error is the right answer
        again = gradients(out, inputs, p.d_out)
        assert all(bitwise_equal(again[name], expected[name]) for name in inputs)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(reentrant, recompute):
    p = Problem(SMALL)
    plain, inputs = inputs_of(p), inputs_of(p)
    run(p, plain).backward(p.d_out)

    def layer(*tensors):
        return run(p, dict(zip(NAMES, tensors)), recompute)

    checkpoint(layer, *inputs.values(), use_reentrant=reentrant).backward(p.d_out)
    for name in inputs:
        assert bitwise_equal(inputs[name].grad, plain[name].grad), name


@BOTH
def test_two_backwards_over_a_checkpoint(recompute):
    """A recomputed H is fresh each time: both backwards are right."""
    p = Problem(SMALL)
    plain, inputs = inputs_of(p), inputs_of(p)
    expected = gradients(run(p, plain), plain, p.d_out)

    def layer(*tensors):
        return run(p, dict(zip(NAMES, tensors)), recompute)

    out = checkpoint(layer, *inputs.values(), use_reentrant=False)
    for retain in (True, False):
        got = gradients(out, inputs, p.d_out, retain_graph=retain)
        assert all(bitwise_equal(got[name], expected[name]) for name in inputs)


@BOTH
@pytest.mark.parametrize("saved", ["combine", "gate_up", "grouped_gemm", "combine+gate_up+grouped_gemm"])
def test_selective_checkpoint(saved, recompute):
    """Two layers, so that the second is recomputed from an output that the first one wrote into an argument.

    A saved op does not run again: combine returns nothing to save, and must run for its argument to be written.
    """
    p = Problem(SMALL)
    plain, inputs = inputs_of(p), inputs_of(p)
    ops = [getattr(torch.ops.moe_kernels, name).default for name in saved.split("+")]
    contexts = functools.partial(create_selective_checkpoint_contexts, ops)

    def two_layers(*tensors):
        named = dict(zip(NAMES, tensors))
        return run(p, named | {"x": run(p, named, recompute)}, recompute)

    expected = gradients(two_layers(*plain.values()), plain, p.d_out)
    out = checkpoint(two_layers, *inputs.values(), use_reentrant=False, context_fn=contexts)
    got = gradients(out, inputs, p.d_out)
    for name in inputs:
        assert bitwise_equal(got[name], expected[name]), name


@BOTH
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_anomaly_detection_with_dropped_slots(bias, recompute):
    """It looks at every element of a gradient, and the rows that no expert owns are never written."""
    p = Problem(DROPPING)
    plain, inputs = inputs_of(p, bias), inputs_of(p, bias)
    expected = gradients(run(p, plain, recompute), plain, p.d_out)
    with torch.autograd.detect_anomaly():
        got = gradients(run(p, inputs, recompute), inputs, p.d_out)
    assert all(bitwise_equal(got[name], expected[name]) for name in inputs)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_backward_inside_an_autocast_region(dtype, recompute):
    """The plain products of the backward, those of the down bias, would otherwise round their fp32 operands."""
    p = Problem(SMALL, dtype=dtype)
    plain, inputs = inputs_of(p), inputs_of(p)
    expected = gradients(run(p, plain, recompute), plain, p.d_out)
    out = run(p, inputs, recompute)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(out, inputs, p.d_out)
    for name in inputs:
        assert bitwise_equal(got[name], expected[name]), name


@BOTH
def test_forward_and_backward_inside_an_autocast_region(recompute):
    p = Problem(SMALL)
    results = []
    for inside in (False, True):
        inputs = inputs_of(p)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(p, inputs, recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            results.append(gradients(out, inputs, p.d_out))
    for name in NAMES:
        assert bitwise_equal(results[0][name], results[1][name]), name


@BOTH
def test_double_backward_is_refused(recompute):
    p = Problem(SMALL)
    inputs = inputs_of(p)
    out = run(p, inputs, recompute)
    with pytest.raises(RuntimeError, match="double backward"):
        gradients(out, inputs, p.d_out, create_graph=True)


@BOTH
def test_two_uses_of_one_plan_and_weights(recompute):
    """Two layers that share everything: the gradients add up."""
    p = Problem(SMALL, dtype=torch.float64)
    ours, theirs = inputs_of(p), inputs_of(p)
    for inputs, layer in ((ours, lambda x: run(p, ours | {"x": x}, recompute)), (theirs, None)):
        layer = layer or (lambda x: naive(p, theirs | {"x": x}))
        layer(layer(inputs["x"])).backward(p.d_out)
    for name in NAMES:
        assert_close(ours[name].grad, theirs[name].grad, what=f"gradient of {name}")


@BOTH
def test_under_a_dispatch_mode(recompute, op_counter):
    """FLOP counters and selective checkpointing run the backward below autograd, inside a TorchDispatchMode."""
    p = Problem(SMALL)
    plain, inputs = inputs_of(p), inputs_of(p)
    expected = gradients(run(p, plain, recompute), plain, p.d_out)
    with op_counter:
        got = gradients(run(p, inputs, recompute), inputs, p.d_out)
    assert all(bitwise_equal(got[name], expected[name]) for name in inputs)
