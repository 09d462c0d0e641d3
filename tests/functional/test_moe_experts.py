"""moe_experts against its definition: values and gradients, what is computed, what is kept."""

import contextlib

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.functional import routing_plan
from tests.functional.experts import BOTH, NAMES, RECOMPUTE, SMALL, WIDE, gradients, inputs_of, naive, run
from tests.helpers import LAYOUTS, NUMBERS, Case, Problem, assert_close, bitwise_equal

CASES = [
    Case(13, 2, 4, 8, 5, block_m=16),
    Case(1, 1, 1, 8, 8, block_m=16),
    Case(0, 2, 4, 8, 5, block_m=16),
    Case(9, 3, 5, 7, 6, routing="sentinels", block_m=16),
    Case(8, 2, 4, 8, 8, routing="all_to_one", block_m=16),
    Case(10, 2, 7, 8, 8, routing="empty", block_m=16),
    Case(12, 4, 3, 8, 8, routing="duplicates", block_m=16),
    Case(6, 2, 4, 8, 8, routing="all_dropped", block_m=16),
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _reference():
    """What is tested here is what surrounds the ops."""
    with use_backend("reference"):
        yield


# Values


@TABLE
@BOTH
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_against_naive_autograd(case, bias, recompute):
    p = Problem(case, dtype=torch.float64)
    ours, theirs = inputs_of(p, bias), inputs_of(p, bias)
    out, truth = run(p, ours, recompute), naive(p, theirs)
    assert_close(out, truth)
    expected = gradients(truth, theirs, p.d_out, allow_unused=True, materialize_grads=True)
    for name, grad in gradients(out, ours, p.d_out).items():
        assert_close(grad, expected[name], what=f"gradient of {name}")


@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_activations_against_naive_autograd(activation, interleaved, bias):
    p = Problem(SMALL._replace(activation=activation, interleaved=interleaved), dtype=torch.float64)
    theirs = inputs_of(p, bias)
    truth = naive(p, theirs)
    expected = gradients(truth, theirs, p.d_out)
    by_mode = []
    for recompute in RECOMPUTE:
        ours = inputs_of(p, bias)
        out = run(p, ours, recompute)
        assert_close(out, truth)
        by_mode.append(gradients(out, ours, p.d_out))
        for name, grad in by_mode[-1].items():
            assert_close(grad, expected[name], what=f"gradient of {name}")
    for name in theirs:
        assert bitwise_equal(by_mode[0][name], by_mode[1][name]), f"recomputing changes the gradient of {name}"


@pytest.mark.parametrize("case", [SMALL, CASES[3], CASES[4], CASES[6]], ids=str)
@pytest.mark.parametrize(
    "activation,interleaved", [("swiglu", False), ("gelu", False), *((name, name[-3:] == "oai") for name in NUMBERS)]
)
def test_gradcheck(case, activation, interleaved):
    """Only the recompute mode survives gradcheck's repeated backwards; the other mode gives the same bits (above)."""
    p = Problem(case._replace(activation=activation, interleaved=interleaved), dtype=torch.float64)
    inputs = inputs_of(p)
    assert torch.autograd.gradcheck(
        lambda *tensors: run(p, dict(zip(NAMES, tensors)), "pre_activation"), tuple(inputs.values()), fast_mode=True
    )


@BOTH
@pytest.mark.parametrize("case", [CASES[5], CASES[7], CASES[2]], ids=str)
def test_experts_without_tokens_get_zero_gradients(case, recompute):
    p = Problem(case)
    inputs = inputs_of(p)
    run(p, inputs, recompute).backward(p.d_out)
    empty = p.plan.tokens_per_expert_E == 0
    assert empty.any()
    for name, tensor in inputs.items():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name
        if name in NAMES[2:]:
            assert (tensor.grad[empty] == 0).all(), name


@BOTH
def test_dropped_slots_contribute_nothing(recompute):
    p = Problem(CASES[3])
    inputs = inputs_of(p)
    out = run(p, inputs, recompute)
    out.backward(p.d_out)
    assert (out[0] == 0).all() and (inputs["x"].grad[0] == 0).all(), "token 0 has no expert"
    assert (inputs["weights"].grad[p.plan.positions_TK < 0] == 0).all()


@BOTH
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_the_weight_of_a_dropped_slot_is_never_read(bias, recompute):
    """A router that drops a slot may leave anything in its weight."""
    p = Problem(CASES[3])
    dropped = p.plan.positions_TK < 0
    assert dropped.any()
    plain, inputs = inputs_of(p, bias), inputs_of(p, bias)
    with torch.no_grad():
        plain["weights"][dropped] = 0
        inputs["weights"][dropped] = torch.nan
    expected, out = run(p, plain, recompute), run(p, inputs, recompute)
    assert bitwise_equal(out, expected)
    grads = gradients(out, inputs, p.d_out)
    for name, grad in gradients(expected, plain, p.d_out).items():
        assert grads[name].isfinite().all() and bitwise_equal(grads[name], grad), name


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_with_the_librarys_own_plan(ids):
    p = Problem(CASES[3], dtype=torch.float64)
    inputs = inputs_of(p)
    out = run(p, inputs, plan=routing_plan(p.indices.clamp(-5, 1000).to(ids), p.case.E))
    assert_close(out, naive(p, inputs))


@BOTH
@pytest.mark.parametrize("strided", ["x", "x.T", "w_gate_up", "w_down", "weights", "d_out", "expanded d_out"])
def test_strided_inputs(strided, recompute):
    p = Problem(SMALL, dtype=torch.float64)
    inputs, d_out = inputs_of(p), p.d_out
    if strided == "x":
        inputs["x"] = torch.cat([p.x, p.x], 1)[:, 8:].requires_grad_()
    elif strided == "x.T":
        inputs["x"] = p.x.T.contiguous().T.requires_grad_()
    elif strided.startswith("w_"):  # stored [E, in, out], as gpt-oss keeps them
        inputs[strided] = getattr(p, strided).mT.contiguous().mT.requires_grad_()
    elif strided == "weights":
        inputs["weights"] = p.weights.T.contiguous().T.requires_grad_()
    elif strided == "d_out":
        d_out = p.d_out.T.contiguous().T
    else:
        d_out = p.d_out[:1].expand_as(p.x)
    theirs = inputs_of(p)
    truth = naive(p, theirs)
    out = run(p, inputs, recompute)
    assert_close(out, truth)
    expected = gradients(truth, theirs, d_out)
    for name, grad in gradients(out, inputs, d_out).items():
        assert_close(grad, expected[name], what=f"gradient of {name}")


@BOTH
@pytest.mark.parametrize("trained", [NAMES, ("w_gate_up", "w_down"), ("bias_gate_up",)], ids="+".join)
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
def test_gradients_of_transposed_weights_lie_like_them(interleaved, trained, recompute):
    """A parameter [E, in, out] passed as its .mT: .grad has its layout and is the product's own memory, not a copy."""
    p = Problem(SMALL._replace(activation="swiglu_oai", interleaved=interleaved), dtype=torch.float64)
    inputs, theirs = inputs_of(p, frozen=set(NAMES) - set(trained)), inputs_of(p)
    stored = {}
    for name in ("w_gate_up", "w_down"):
        stored[name] = getattr(p, name).mT.contiguous().requires_grad_(name in trained)
        inputs[name] = stored[name].mT
    out, truth = run(p, inputs, recompute), naive(p, theirs)
    assert_close(out, truth)
    out.backward(p.d_out)
    expected = gradients(truth, theirs, p.d_out)
    for name in trained:
        if name in stored:
            assert stored[name].grad.is_contiguous()
            assert_close(stored[name].grad, expected[name].mT, what=f"gradient of {name}")
        else:
            assert_close(inputs[name].grad, expected[name], what=f"gradient of {name}")


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
def test_bf16_data(weights):
    p = Problem(WIDE, dtype=torch.bfloat16)
    ours, plain, theirs = inputs_of(p), inputs_of(p), inputs_of(p)
    ours["weights"] = p.weights.to(weights).requires_grad_()
    theirs = {name: tensor.detach().double().requires_grad_() for name, tensor in theirs.items()}
    out, torchs, truth = run(p, ours), naive(p, plain), naive(p, theirs)
    assert out.dtype == torch.bfloat16
    assert_close(out, truth, torchs)
    expected, in_bf16 = gradients(truth, theirs, p.d_out.double()), gradients(torchs, plain, p.d_out)
    for name, grad in gradients(out, ours, p.d_out).items():
        assert grad.dtype == ours[name].dtype
        assert_close(grad.bfloat16(), expected[name], in_bf16[name], f"gradient of {name}")


# What is done, and what is not


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_input_gets_no_gradient(name, recompute):
    p = Problem(SMALL)
    everything, inputs = inputs_of(p), inputs_of(p, frozen=(name,))
    run(p, everything, recompute).backward(p.d_out)
    run(p, inputs, recompute).backward(p.d_out)
    for other, tensor in inputs.items():
        if other == name:
            assert tensor.grad is None
        elif (name, other) == ("w_gate_up", "bias_gate_up"):  # then a sum of its own, in another order
            assert_close(tensor.grad, everything[other].grad.double(), what=other)
        else:
            assert bitwise_equal(tensor.grad, everything[other].grad), other


@BOTH
@pytest.mark.parametrize(
    "trained,wgrads,products",  # weight gradients, and grouped products of the backward (dX)
    [
        (NAMES, 2, 1),
        (("x",), 0, 1),
        (("weights",), 0, 0),
        (("w_down",), 1, 0),
        (("w_gate_up",), 1, 0),
        (("x", "weights"), 0, 1),
        (("w_gate_up", "w_down"), 2, 0),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_frozen_inputs_cost_no_product(trained, wgrads, products, recompute, op_counter):
    p = Problem(SMALL)
    out = run(p, inputs_of(p, frozen=set(NAMES) - set(trained)), recompute)
    with op_counter:
        out.backward(p.d_out)
    assert op_counter.calls["grouped_wgrad"] == wgrads
    assert op_counter.calls["grouped_gemm"] == products
    assert op_counter.calls["gate_up"] == (1 if recompute else 0)


@BOTH
@pytest.mark.parametrize("name", ["bias_gate_up", "bias_down"])
def test_training_one_bias_alone(name, recompute, op_counter):
    """As bias-only fine-tuning does: neither the other gradients nor the weight's own are made on the way."""
    p = Problem(WIDE, dtype=torch.float64)
    inputs, theirs = inputs_of(p, frozen=set(NAMES) - {name}), inputs_of(p)
    truth = naive(p, theirs)
    out = run(p, inputs, recompute)
    with op_counter:
        out.backward(p.d_out)
    assert_close(inputs[name].grad, gradients(truth, theirs, p.d_out)[name])
    if name == "bias_down":
        assert op_counter.calls == {}
    else:
        expected = {"d_activation_": 1, "grouped_wgrad": 1} | ({"gate_up": 1} if recompute else {})
        assert op_counter.calls == expected
        assert op_counter.shapes["grouped_wgrad"] == [[p.case.E, p.case.N, 0]], "sums, not the weight's gradient"


@BOTH
@pytest.mark.parametrize(
    "frozen", [("weights",), ("weights", "w_down"), ("x", "weights", "w_gate_up", "bias_gate_up")], ids="+".join
)
def test_down_bias_with_frozen_routing_weights(frozen, recompute):
    p = Problem(CASES[3], dtype=torch.float64)
    ours, theirs = inputs_of(p, frozen=frozen), inputs_of(p)
    expected = gradients(naive(p, theirs), theirs, p.d_out)
    run(p, ours, recompute).backward(p.d_out)
    for name, tensor in ours.items():
        if name in frozen:
            assert tensor.grad is None, name
        else:
            assert_close(tensor.grad, expected[name], what=f"gradient of {name}")


def test_forward_without_a_backward_keeps_nothing(op_counter):
    p = Problem(SMALL)
    for inputs, mode in ((inputs_of(p, frozen=NAMES), contextlib.nullcontext()), (inputs_of(p), torch.no_grad())):
        with mode, op_counter, saved_tensors() as saved:
            out = run(p, inputs)
        assert not out.requires_grad and saved == {}
    assert op_counter.calls == {"gate_up": 2, "grouped_gemm": 2, "combine": 2}


@BOTH
def test_indices_instead_of_their_plan(recompute):
    p = Problem(CASES[3])
    results = []
    for routing in (p.indices, routing_plan(p.indices, p.case.E)):
        inputs = inputs_of(p)
        out = run(p, inputs, recompute, plan=routing)
        results.append([out, *gradients(out, inputs, p.d_out).values()])
    assert all(bitwise_equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("routing", ["indices", "plan"])
def test_forward_without_a_backward_gives_the_same(routing):
    p = Problem(CASES[3])
    inputs, indices_or_plan = inputs_of(p), getattr(p, routing)
    expected = run(p, inputs, plan=indices_or_plan)
    with torch.no_grad():
        out = run(p, inputs, plan=indices_or_plan)
    assert expected.requires_grad and not out.requires_grad and bitwise_equal(out, expected.detach())


FEW = Case(10, 2, 4, 8, 5, block_m=16)


@pytest.mark.parametrize(
    "what,decodes",
    [
        ("indices", True),
        ("plan", False),
        ("gradient", False),
        ("many rows an expert", False),
        ("autocast", False),
        ("no kernel", False),
    ],
)
def test_few_tokens_without_a_gradient_need_no_plan(what, decodes, monkeypatch, op_counter):
    p = Problem(FEW._replace(E=1) if what == "many rows an expert" else FEW)
    monkeypatch.setattr(backends, "is_first", lambda *_: what != "no kernel")  # here the reference stands in
    inputs = inputs_of(p, frozen=() if what == "gradient" else NAMES)
    with op_counter, torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        out = run(p, inputs, plan=p.plan if what == "plan" else p.indices)
    assert op_counter.calls.get("decode_experts", 0) == (1 if decodes else 0), op_counter.calls
    if decodes:
        assert sum(op_counter.calls.values()) == 1
        assert_close(out, naive(p, inputs))


@contextlib.contextmanager
def saved_tensors():
    """address of the storage -> a tensor on it, for everything autograd saves inside."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


@BOTH
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_bytes(dtype, activation, bias, recompute):
    """X, H (unless recomputed), the plan and the routing weights; parameters are saved by reference."""
    p = Problem(WIDE._replace(activation=activation), dtype=dtype)
    inputs = inputs_of(p, bias)
    with saved_tensors() as saved:
        run(p, inputs, recompute)
    T, K, D, N, size = p.case.T, p.case.K, p.case.D, p.case.N, dtype.itemsize
    for name in inputs:
        if name.startswith(("w_", "bias")):
            saved.pop(inputs[name].untyped_storage().data_ptr(), None)
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    plan = 4 * sum(tensor.numel() for tensor in p.plan[:4])
    stand_in = size if recompute else 0  # the one element that stands for H in the graph
    assert held == T * D * size + (0 if recompute else T * K * N * size) + T * K * size + plan + stand_in


def test_no_saved_tensor_is_a_cast_copy():
    """fp32 parameters under autocast are saved as they are and cast again: a bf16 copy of them would be kept alive."""
    p = Problem(WIDE)
    inputs = inputs_of(p, bias=False)
    with saved_tensors() as saved, torch.autocast("cpu", torch.bfloat16):
        run(p, inputs)
    for name in ("w_gate_up", "w_down"):
        assert inputs[name].untyped_storage().data_ptr() in saved, name
    assert not [t.shape for t in saved.values() if t.dim() == 3 and t.dtype == torch.bfloat16]


@BOTH
def test_autocast(recompute, op_counter):
    p = Problem(WIDE)
    ours = inputs_of(p)
    with op_counter:
        with torch.autocast("cpu", torch.bfloat16):
            out = run(p, ours, recompute)
        grads = gradients(out, ours, p.d_out)
    assert out.dtype == torch.float32
    for op in ("gate_up", "grouped_gemm", "d_activation_", "grouped_wgrad"):
        for dtypes in op_counter.dtypes[op]:
            assert dtypes[:2] == [torch.bfloat16] * 2, op
    # The truth rounds what autocast rounds: the inputs of the products
    theirs = {
        name: (tensor if name == "weights" else tensor.bfloat16()).detach().double().requires_grad_()
        for name, tensor in ours.items()
    }
    in_bf16 = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in ours.items()}
    truth, plain = naive(p, theirs), naive(p, in_bf16)
    assert_close(out.bfloat16(), truth, plain)
    d_out = p.d_out.bfloat16()
    expected, bf16 = gradients(truth, theirs, d_out.double()), gradients(plain, in_bf16, d_out)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32, name
        assert_close(grad.bfloat16(), expected[name], bf16[name], f"gradient of {name}")


def test_reruns_are_bitwise_equal():
    p = Problem(WIDE)
    results = []
    for _ in range(2):
        inputs = inputs_of(p)
        out = run(p, inputs)
        results.append([out, *gradients(out, inputs, p.d_out).values()])
    assert all(bitwise_equal(a, b) for a, b in zip(*results))
