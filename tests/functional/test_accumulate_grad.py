"""moe_experts with accumulate_grad: the sums of ordinary accumulation, without a gradient beside ``.grad``, and every
case in which autograd must get the gradient all the same."""

import contextlib
import re
import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_kernels.functional import _row_product, moe_experts
from tests.functional.experts import BOTH, SMALL, WIDE, gradients, inputs_of, run
from tests.helpers import Case, Problem, bitwise_equal

pytestmark = pytest.mark.filterwarnings("error")

WEIGHTS = ("w_gate_up", "w_down")
CASES = [
    SMALL,
    WIDE,
    Case(40, 2, 6, 16, 8, routing="empty"),
    Case(40, 2, 6, 16, 8, "relu2", routing="sentinels"),
    Case(40, 2, 4, 16, 8, "swiglu_oai", interleaved=True),
    Case(10, 2, 4, 16, 8, routing="all_dropped"),
    Case(0, 2, 4, 16, 8),
]


@contextlib.contextmanager
def refused(reason):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in said if "moe_experts" in str(warning.message)]
    assert texts and all(re.search(f"accumulate_grad is off where .*{reason}", text) for text in texts), texts


def leaves(p, transposed=False, **kwargs):
    inputs = inputs_of(p, **kwargs)
    for name in WEIGHTS if transposed else ():
        inputs[name] = inputs[name].detach().mT.contiguous().requires_grad_()
    return inputs


def forward(p, inputs, recompute=None, accumulate_grad=True, transposed=False, **changed):
    named = inputs | ({name: inputs[name].mT for name in WEIGHTS} if transposed else {}) | changed
    return run(p, named, recompute, accumulate_grad=accumulate_grad)


def steps(p, count=2, accumulate_grad=True, **kwargs):
    """``.grad`` of each input after some micro-steps."""
    inputs = leaves(p, kwargs.get("transposed", False))
    for i in range(count):
        forward(p, inputs, accumulate_grad=accumulate_grad, **kwargs).backward(p.d_out * (i + 1))
    return inputs


def assert_same_grads(ours, theirs):
    for name, tensor in ours.items():
        assert bitwise_equal(tensor.grad, theirs[name].grad), name


@BOTH
@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_as_ordinary_accumulation(case, dtype, transposed, recompute, op_counter):
    p, how = Problem(case, dtype=dtype), {"transposed": transposed, "recompute": recompute}
    with op_counter:
        ours = steps(p, 3, **how)
    assert op_counter.calls["grouped_wgrad_"] == 2 * 2, "the first step finds no .grad"
    assert_same_grads(ours, steps(p, 3, accumulate_grad=False, **how))


def test_it_is_added_where_grad_lies(op_counter):
    p = Problem(WIDE)
    inputs = leaves(p)
    forward(p, inputs).backward(p.d_out)
    before = {name: (inputs[name].grad.data_ptr(), inputs[name].grad._version) for name in WEIGHTS}
    with op_counter:
        forward(p, inputs).backward(p.d_out)
    for name, (address, version) in before.items():
        assert inputs[name].grad.data_ptr() == address and inputs[name].grad._version > version
    sums_of_biases = 1
    assert op_counter.calls["grouped_wgrad"] == sums_of_biases and op_counter.shapes["grouped_wgrad"] == [[4, 80, 0]]


@pytest.mark.parametrize("frozen", [WEIGHTS, WEIGHTS[:1], WEIGHTS[1:], ("x", "weights")], ids=str)
def test_frozen(frozen):
    p = Problem(WIDE)
    ours, theirs = leaves(p, frozen=frozen), leaves(p, frozen=frozen)
    for accumulate_grad, inputs in ((True, ours), (False, theirs)):
        for _ in range(2):
            forward(p, inputs, accumulate_grad=accumulate_grad).backward(p.d_out)
    assert all(ours[name].grad is None for name in frozen)
    assert_same_grads(
        {name: t for name, t in ours.items() if t.requires_grad}, {n: t for n, t in theirs.items() if t.requires_grad}
    )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_zero_grad(set_to_none):
    p = Problem(WIDE)
    inputs, once = steps(p), steps(p, 1, accumulate_grad=False)
    torch.optim.SGD(inputs.values(), 0.0).zero_grad(set_to_none)
    forward(p, inputs).backward(p.d_out)
    assert_same_grads(inputs, once)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(reentrant, recompute, op_counter):
    p = Problem(WIDE)
    inputs = leaves(p)
    with op_counter:
        for i in range(2):
            out = checkpoint(lambda x: forward(p, inputs, recompute, x=x), inputs["x"], use_reentrant=reentrant)
            out.backward(p.d_out * (i + 1))
    assert op_counter.calls["grouped_wgrad_"] == 2
    assert_same_grads(inputs, steps(p, accumulate_grad=False, recompute=recompute))


def test_saved_tensors_that_were_offloaded(op_counter):
    """A hook hands back other tensors than were saved."""
    p = Problem(WIDE)
    inputs = steps(p, 1)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone), op_counter:
        forward(p, inputs).backward(p.d_out * 2)
    assert op_counter.calls["grouped_wgrad_"] == 2
    assert_same_grads(inputs, steps(p, accumulate_grad=False))


def test_two_layers_on_the_same_weights():
    """Autograd sums both gradients and adds that; we add one after the other."""
    p = Problem(WIDE, dtype=torch.float64)
    ours, theirs = leaves(p), leaves(p)
    for accumulate_grad, inputs in ((True, ours), (False, theirs)):
        for _ in range(2):
            first = forward(p, inputs, accumulate_grad=accumulate_grad)
            forward(p, inputs, accumulate_grad=accumulate_grad, x=first).backward(p.d_out)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad)


def test_a_weight_that_others_use_too():
    p = Problem(WIDE, dtype=torch.float64)
    ours, theirs = leaves(p), leaves(p)
    for accumulate_grad, inputs in ((True, ours), (False, theirs)):
        for _ in range(2):
            out = forward(p, inputs, accumulate_grad=accumulate_grad)
            ((out * p.d_out).sum() + inputs["w_down"].square().sum()).backward()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad)


def test_a_second_backward_over_the_graph():
    p = Problem(WIDE)
    ours, theirs = leaves(p), leaves(p)
    for accumulate_grad, inputs in ((True, ours), (False, theirs)):
        out = forward(p, inputs, "pre_activation", accumulate_grad)
        for keep in (True, True, False):
            out.backward(p.d_out, retain_graph=keep)
    assert_same_grads(ours, theirs)


# dtypes


def test_fp32_grad_of_a_bf16_parameter(op_counter):
    """It gets sums that were not rounded to bf16 on the way."""
    p = Problem(WIDE, dtype=torch.bfloat16)
    inputs = leaves(p)
    for name in WEIGHTS:
        inputs[name].grad_dtype = None
        inputs[name].grad = torch.zeros_like(inputs[name], dtype=torch.float32)
    with op_counter:
        forward(p, inputs).backward(p.d_out)
    assert op_counter.calls["grouped_wgrad_"] == 2
    once = steps(p, 1, accumulate_grad=False)
    for name in WEIGHTS:
        grad = inputs[name].grad
        assert grad.dtype == torch.float32 and bitwise_equal(grad.bfloat16(), once[name].grad)
        assert (grad != grad.bfloat16()).any()


def test_autocast(op_counter):
    p = Problem(WIDE)
    ours, theirs = leaves(p), leaves(p)
    with op_counter:
        for accumulate_grad, inputs in ((True, ours), (False, theirs)):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    out = forward(p, inputs, accumulate_grad=accumulate_grad)
                out.backward(p.d_out)
    assert op_counter.calls["grouped_wgrad_"] == 2
    assert op_counter.dtypes["grouped_wgrad_"][0][:2] == [torch.bfloat16] * 2
    assert ours["w_down"].grad.dtype == torch.float32
    assert_same_grads(ours, theirs)


# Where autograd gets the gradient


def check_refused(p, inputs, reason, prepare):
    """``.grad`` after two micro-steps, of which the second makes its gradients in the ordinary way."""
    forward(p, inputs).backward(p.d_out)
    prepare()
    out = forward(p, inputs)
    with refused(reason):
        out.backward(p.d_out * 2)
    assert_same_grads(inputs, steps(p, accumulate_grad=False))


def test_tensor_hooks_see_their_gradient():
    p, seen = Problem(WIDE), []
    inputs = leaves(p)
    check_refused(p, inputs, "tensor hooks", lambda: inputs["w_down"].register_hook(lambda d: seen.append(d.clone())))
    once = steps(p, 1, accumulate_grad=False)
    assert len(seen) == 1 and bitwise_equal(seen[0], once["w_down"].grad * 2)


def test_post_accumulate_grad_hooks():
    """As an optimizer step in the backward uses them."""
    p, seen = Problem(WIDE), []
    inputs = leaves(p)
    hook = inputs["w_gate_up"].register_post_accumulate_grad_hook
    check_refused(p, inputs, "hooks that run when", lambda: hook(lambda w: seen.append(w.grad.clone())))
    assert len(seen) == 1 and bitwise_equal(seen[0], inputs["w_gate_up"].grad)


def seen_at_the_node(kind, accumulate_grad):
    """Over three micro-steps, what a hook on the node of a weight is handed and what it finds in ``.grad``."""
    p, handed, found = Problem(WIDE), [], []
    inputs = leaves(p)
    w = inputs["w_down"]
    node = torch.autograd.graph.get_gradient_edge(w).node

    def hook(*gradients):
        handed.append(gradients[-1][0])
        found.append(torch.zeros_like(w) if w.grad is None else w.grad.clone())

    getattr(node, kind)(hook)
    for i in range(3):
        forward(p, inputs, accumulate_grad=accumulate_grad).backward(p.d_out * (i + 1))
    return handed, found


def test_hooks_that_run_after_the_node_find_the_same_sums():
    """Nobody sees them and says so; they are handed no gradient, but what they find in ``.grad`` is right."""
    (handed, found), (gradients, expected) = (seen_at_the_node("register_hook", on) for on in (True, False))
    assert all(map(bitwise_equal, found, expected))
    assert bitwise_equal(handed[0], gradients[0]) and handed[1:] == [None, None]


def test_hooks_that_run_before_the_node_are_handed_no_gradient():
    """A hole, and no warning of it: from the second micro-step on the gradient is in ``.grad`` by then."""
    (handed, found), (gradients, expected) = (seen_at_the_node("register_prehook", on) for on in (True, False))
    assert bitwise_equal(handed[0], gradients[0]) and handed[1:] == [None, None]
    assert bitwise_equal(found[0], expected[0])
    assert all(bitwise_equal(ours, sums + d) for ours, sums, d in zip(found[1:], expected[1:], gradients[1:]))


def test_autograd_grad():
    p = Problem(WIDE)
    inputs, once = steps(p, 1), steps(p, 1, accumulate_grad=False)
    out = forward(p, inputs)
    with refused("does not accumulate"):
        found = gradients(out, inputs, p.d_out)
    assert all(bitwise_equal(found[name], tensor.grad) for name, tensor in once.items())
    assert_same_grads(inputs, once)


@pytest.mark.parametrize("transposed", [False, True], ids=["as-is", "transposed"])
def test_backward_to_other_inputs(transposed):
    p = Problem(WIDE)
    inputs = steps(p, 1, transposed=transposed)
    before = {name: inputs[name].grad.clone() for name in WEIGHTS}
    out = forward(p, inputs, transposed=transposed)
    with refused("does not accumulate"):
        out.backward(p.d_out, inputs=[inputs["x"]])
    assert all(bitwise_equal(inputs[name].grad, before[name]) for name in WEIGHTS)


def test_backward_to_the_weights():
    p = Problem(WIDE)
    inputs, theirs = steps(p, 1), steps(p)
    forward(p, inputs).backward(p.d_out * 2, inputs=[inputs[name] for name in WEIGHTS])
    for name in WEIGHTS:
        assert bitwise_equal(inputs[name].grad, theirs[name].grad)


def test_weights_made_from_others():
    """As PEFT merges an adapter: the gradient goes on to what they were made from."""
    p = Problem(WIDE)
    base, adapter = p.w_down.clone(), torch.zeros_like(p.w_down, requires_grad=True)
    inputs = leaves(p)
    del inputs["w_down"]
    for _ in range(2):
        out = forward(p, inputs, w_down=base + adapter)
        with refused("neither a parameter nor the .mT of one"):
            out.backward(p.d_out)
    expected = leaves(p)
    for _ in range(2):
        forward(p, expected, accumulate_grad=False).backward(p.d_out)
    assert bitwise_equal(adapter.grad, expected["w_down"].grad)


@pytest.mark.parametrize("view", ["slice", "permuted"])
def test_other_views_of_a_parameter(view):
    p = Problem(Case(40, 2, 4, 16, 8))
    parameter = (torch.cat([p.w_down, p.w_down]) if view == "slice" else p.w_down.permute(1, 0, 2)).clone()
    parameter = parameter.contiguous().requires_grad_()
    inputs = leaves(p)
    for _ in range(2):
        w_down = parameter[: p.case.E] if view == "slice" else parameter.permute(1, 0, 2)
        out = forward(p, inputs, w_down=w_down)
        with refused("neither a parameter"):
            out.backward(p.d_out)
    theirs = leaves(p)
    for _ in range(2):
        forward(p, theirs, accumulate_grad=False).backward(p.d_out)
    found = parameter.grad[: p.case.E] if view == "slice" else parameter.grad.permute(1, 0, 2)
    torch.testing.assert_close(found, theirs["w_down"].grad)


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda g: g.mT.contiguous().mT, "laid out otherwise"),
        (lambda g: g.clone().requires_grad_(), "requires a gradient itself"),
    ],
    ids=["strides", "create-graph"],
)
def test_a_grad_that_we_can_not_add_to(change, reason):
    p = Problem(WIDE)
    inputs = leaves(p)

    def prepare():
        inputs["w_down"].grad = change(inputs["w_down"].grad)

    check_refused(p, inputs, reason, prepare)


def test_a_grad_of_another_dtype():
    p = Problem(WIDE, dtype=torch.bfloat16)
    inputs = leaves(p)
    inputs["w_down"].grad_dtype = None
    inputs["w_down"].grad = torch.zeros_like(p.w_down, dtype=torch.float64)
    out = forward(p, inputs)
    with refused("torch.float64, not float32 nor the torch.bfloat16"):
        out.backward(p.d_out)
    assert inputs["w_down"].grad.dtype == torch.float64 and inputs["w_down"].grad.any()


def test_inside_distributed_data_parallel(monkeypatch, op_counter):
    """Its reducer is told of a gradient by autograd; tests/functional/test_accumulate_grad_distributed.py runs it."""
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", object())
    p = Problem(WIDE)
    inputs = leaves(p)
    with op_counter:
        for _ in range(2):
            with refused("DistributedDataParallel"):
                forward(p, inputs).backward(p.d_out)
    assert op_counter.calls["grouped_wgrad_"] == 0


def test_double_backward_is_refused_as_ever():
    p = Problem(WIDE)
    inputs = steps(p, 1)
    with pytest.raises(RuntimeError, match="create_graph"):
        forward(p, inputs).backward(p.d_out, create_graph=True)


# Memory


def test_row_buffers_are_no_larger_than_their_rows(monkeypatch, op_counter):
    """Beside no gradient of the weights' size, Y and dX rows would make the peak."""
    monkeypatch.setattr(_row_product, "_ROW_BUFFER_BYTES", 0)
    p = Problem(Case(64, 4, 4, 2048, 256, block_m=64))
    inputs = leaves(p)
    with op_counter:
        out = forward(p, inputs)
        assert op_counter.shapes["grouped_gemm"] == [[256, 256]] * 8
        out.backward(p.d_out)
    assert op_counter.shapes["grouped_gemm"][8:] == [[256, 512]] * 4
    with torch.no_grad(), op_counter:
        op_counter.shapes.clear()
        forward(p, inputs)
    assert op_counter.shapes["grouped_gemm"] == [[256, 2048]], "there is no backward"


def test_signature_is_off_by_default():
    p = Problem(SMALL)
    inputs = inputs_of(p)
    for _ in range(2):
        moe_experts(inputs["x"], inputs["weights"], p.plan, inputs["w_gate_up"], inputs["w_down"]).sum().backward()
