"""A broken contract raises before anything runs, and the message names the argument, what came and what is accepted."""

import re

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.functional import grouped_gemm, moe_experts, routing_plan, topk_route
from tests.helpers import Case, Problem, op_arguments

CASE = Case(6, 2, 4, 16, 8, block_m=16)
P = Problem(CASE)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_BACKEND", raising=False)


# Positions of the arguments in each op's schema
ARGUMENTS = {
    "routing_plan": ("expert_indices", "num_experts", "block_m"),
    "topk_route": (
        "logits", "selection_bias", "top_k", "scoring", "score_after_topk", "renormalize", "epsilon", "scale",
        "num_groups", "top_groups",
    ),
    "permute": ("x", "weights", "offsets", "slots", "top_k"),
    "unpermute": ("y", "positions", "weights"),
    "gate_up": (
        "x", "w_gate_up", "bias_gate_up", "offsets", "slots", "tiles", "block_m", "top_k", "activation", "store_h",
        "store_a",
    ),
    "grouped_gemm": ("a", "w", "bias", "offsets", "tiles", "block_m", "trans_w"),
    "d_activation": ("d_out", "w_down", "h", "weights", "offsets", "slots", "tiles", "block_m", "activation"),
    "grouped_wgrad": ("lhs", "rhs", "offsets", "slots", "top_k", "gather", "sum_lhs", "out_dtype"),
    "combine": ("out", "y", "positions", "weights", "residual"),
}  # fmt: skip


def half(tensor):
    return tensor.half()


def floats(tensor):
    return tensor.float()


def longs(tensor):
    return tensor.long()


def one_more(tensor):
    """One element too many in every dimension."""
    return torch.nn.functional.pad(tensor, (0, 1) * tensor.dim())


def flat(tensor):
    return tensor.flatten()


def meta(tensor):
    return tensor.to("meta")


def becomes(value):
    def replace(_):
        return value

    replace.__name__ = repr(value)
    return replace


# (op, argument, how it is broken, what the message must say beside the op and the argument)
BROKEN = [
    ("routing_plan", "expert_indices", floats, "int64 or int32"),
    ("routing_plan", "expert_indices", flat, r"\[T, K\]"),
    ("routing_plan", "num_experts", becomes(0), "from 1 to 4096"),
    ("routing_plan", "num_experts", becomes(5000), "from 1 to 4096"),
    ("routing_plan", "block_m", becomes(48), "a power of two from 16 to 128"),
    ("routing_plan", "block_m", becomes(8), "a power of two from 16 to 128"),
    ("routing_plan", "block_m", becomes(512), "a power of two from 16 to 128"),
    ("topk_route", "logits", longs, "float32"),
    ("topk_route", "logits", flat, r"\[T, E\]"),
    ("topk_route", "selection_bias", becomes(torch.zeros(3)), r"of shape \[4\]"),
    ("topk_route", "top_k", becomes(0), "from 1 to the number of experts 4"),
    ("topk_route", "top_k", becomes(5), "from 1 to the number of experts 4"),
    ("topk_route", "scoring", becomes("tanh"), "softmax, sigmoid"),
    ("topk_route", "num_groups", becomes(3), "a divisor of the number of experts 4"),
    ("topk_route", "top_groups", becomes(2), "from 1 to num_groups 1"),
    ("permute", "x", flat, r"\[T, D\]"),
    ("permute", "weights", one_more, "T of x"),
    ("permute", "offsets", longs, "int32"),
    ("permute", "slots", one_more, r"R = T \* top_k"),
    ("permute", "slots", meta, "on cpu"),
    ("unpermute", "y", one_more, r"R = T \* K of positions"),
    ("unpermute", "positions", longs, "int32"),
    ("unpermute", "weights", one_more, "shaped like positions"),
    ("gate_up", "x", longs, "float32"),
    ("gate_up", "x", flat, r"\[T, D\]"),
    ("gate_up", "w_gate_up", half, "torch.float32 like x"),
    ("gate_up", "w_gate_up", meta, "on cpu like x"),
    ("gate_up", "w_gate_up", becomes(torch.zeros(4, 16, 15)), "of size 16 in dimension 2"),
    ("gate_up", "w_gate_up", becomes(torch.zeros(4, 15, 16)), "swiglu is gated"),
    ("gate_up", "bias_gate_up", one_more, r"of shape \[4, 16\]"),
    ("gate_up", "bias_gate_up", half, "torch.float32 like x"),
    ("gate_up", "offsets", one_more, r"E \+ 1"),
    ("gate_up", "slots", one_more, r"R = T \* top_k"),
    ("gate_up", "tiles", flat, r"\[2, M\]"),
    ("gate_up", "tiles", lambda tiles: tiles.T.contiguous().T, "contiguous"),
    ("gate_up", "block_m", becomes(17), "a power of two"),
    ("gate_up", "activation", becomes("swish"), "one of swiglu"),
    ("gate_up", "store_h", becomes("both"), "true for at least one output"),
    ("grouped_gemm", "a", flat, r"\[R, C\]"),
    ("grouped_gemm", "w", one_more, "C of a"),
    ("grouped_gemm", "w", half, "torch.float32 like a"),
    ("grouped_gemm", "bias", one_more, r"of shape \[4, 16\]"),
    ("grouped_gemm", "offsets", one_more, r"E \+ 1"),
    ("d_activation", "d_out", flat, r"\[T, D\]"),
    ("d_activation", "w_down", half, "torch.float32 like d_out"),
    ("d_activation", "h", lambda h: h.T.contiguous().T, "contiguous"),
    ("d_activation", "h", lambda h: h[:, :8].contiguous(), "swiglu turns into I = 8"),
    ("d_activation", "weights", one_more, "T of d_out"),
    ("d_activation", "slots", one_more, "R of h"),
    ("d_activation", "activation", becomes("relu"), "one of swiglu"),
    ("grouped_wgrad", "rhs", half, "torch.float32 like lhs"),
    ("grouped_wgrad", "lhs", one_more, "it is gathered"),
    ("grouped_wgrad", "rhs", one_more, "it is not gathered"),
    ("grouped_wgrad", "gather", becomes("both"), "none, lhs, rhs"),
    ("grouped_wgrad", "out_dtype", becomes(torch.int32), "floating"),
    ("combine", "out", one_more, "T of positions"),
    ("combine", "y", half, "torch.float32 like out"),
    ("combine", "positions", longs, "int32"),
    ("combine", "weights", one_more, "shaped like positions"),
    ("combine", "residual", one_more, "shaped like out"),
    ("combine", "residual", meta, "on cpu like out"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op,argument,broken,accepted", BROKEN, ids=[f"{op}-{a}-{b.__name__[:24]}" for op, a, b, _ in BROKEN]
)
def test_op_contract(op, argument, broken, accepted):
    arguments = list(op_arguments(op, P))
    at = ARGUMENTS[op].index(argument)
    if op == "gate_up" and argument == "store_h":
        arguments[-2:] = False, False
    else:
        arguments[at] = broken(arguments[at])
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(torch.ops.moe_kernels, op)(*arguments)
    message = str(error.value)
    assert message.startswith(f"{op}: "), message
    assert re.search(rf"\b{argument}\b.* must be .*{accepted}.*, got ", message), message
    if isinstance(arguments[at], torch.Tensor):
        assert str(list(arguments[at].shape)) in message, "the message says what came"


# The functions users call

CALL = {
    "x_TD": P.x,
    "routing_weights_TK": P.weights,
    "plan": P.plan,
    "w_gate_up_E2ID": P.w_gate_up,
    "w_down_EDI": P.w_down,
    "bias_gate_up_E2I": P.bias_gate_up,
    "bias_down_ED": P.bias_down,
}

# (changed arguments, error, what the message must say)
EXPERTS = [
    ({"activation": "swish"}, ValueError, "activation must be one of swiglu.*'swish'"),
    ({"activation": "relu2"}, ValueError, r"w_down must be .*to match w_gate_up and relu2, got .*\[4, 16, 8\]"),
    ({"recompute": "all"}, ValueError, "recompute must be None or \"pre_activation\", got 'all'"),
    ({"plan": P.indices}, TypeError, "plan must be a RoutingPlan from routing_plan"),
    ({"x_TD": P.x[None]}, ValueError, r"x must be 2-dimensional, \[T, D\], got .*\[1, 6, 16\]"),
    ({"x_TD": P.x.half()}, TypeError, "w_gate_up must be torch.float16 like x.*got a float32 tensor"),
    ({"x_TD": P.x.long()}, TypeError, "must be"),
    ({"x_TD": P.x[:, :8]}, ValueError, r"w_gate_up must be of size 8 in dimension 2 \(D of x\)"),
    ({"x_TD": P.x[:3]}, ValueError, r"slots must be of size 6 .*R = T \* top_k"),
    ({"routing_weights_TK": P.weights[:, :1]}, ValueError, r"routing_weights must be shaped like .*\[6, 2\]"),
    ({"routing_weights_TK": P.weights.to("meta")}, ValueError, "routing_weights must be on cpu like x.*on meta"),
    ({"w_gate_up_E2ID": P.w_gate_up[0]}, ValueError, "w_gate_up.* must be 3-dimensional"),
    ({"w_down_EDI": P.w_down.mT}, ValueError, r"w_down must be \[E, D, I\] = \[4, 16, 8\].*got .*\[4, 8, 16\]"),
    ({"w_down_EDI": P.w_down[:3]}, ValueError, r"w_down must be \[E, D, I\] = \[4, 16, 8\].*got .*\[3, 16, 8\]"),
    ({"w_down_EDI": P.w_down.to("meta")}, ValueError, "w_down must be on cpu like x"),
    ({"bias_gate_up_E2I": P.bias_down[:, :3]}, ValueError, r"bias_gate_up must be of shape \[4, 16\]"),
    ({"bias_down_ED": P.bias_down[:, :3]}, ValueError, r"bias_down must be of shape \[4, 16\]"),
    ({"plan": routing_plan(P.indices, 5)}, ValueError, r"offsets must be of size 5 .*E of the weights"),
]


@pytest.mark.parametrize(
    "changed,error,message", EXPERTS, ids=[f"{next(iter(c))}-{i}" for i, (c, *_) in enumerate(EXPERTS)]
)
def test_moe_experts(changed, error, message):
    with pytest.raises(error, match=message):
        moe_experts(**(CALL | changed))


def test_meta_tensors_run_the_contract_alone():
    """The fakes are the contract: shapes come out right on the meta device, and a mismatch raises there too."""
    on_meta = {k: v.to("meta") for k, v in CALL.items() if k != "plan"}
    plan = routing_plan(P.indices.to("meta"), CASE.E)
    out = moe_experts(plan=plan, **on_meta)
    assert out.shape == P.x.shape and out.device.type == "meta"
    with pytest.raises(ValueError, match="w_down must be"):
        moe_experts(plan=plan, **on_meta | {"w_down_EDI": on_meta["w_down_EDI"].mT})


def test_float_indices_and_integer_logits():
    with pytest.raises(ValueError, match=r"expert_indices must be an int64 or int32 tensor \[T, K\], got a float32"):
        routing_plan(P.x, CASE.E)
    with pytest.raises(TypeError, match=r"logits must be float32.*got a int64 tensor"):
        topk_route(P.indices, 2)


@pytest.mark.parametrize(
    "groups,message",
    [
        ({"top_k": 1, "num_groups": 4}, "num_groups must be such that each group has two experts or more, got 4"),
        ({"top_k": 3, "num_groups": 2}, "top_k must be at most the 2 experts of the kept groups, got 3"),
        ({"top_k": 2, "num_groups": 2, "top_groups": 0}, "top_groups must be from 1 to num_groups 2, got 0"),
    ],
    ids=["tiny-groups", "too-few-kept", "none-kept"],
)
def test_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        topk_route(P.x[:, :4], **groups)


def test_grouped_gemm_orientation():
    with pytest.raises(ValueError, match=r"w must be of size 8 in dimension 1 \(C of a\)"):
        grouped_gemm(P.a, P.w_down, P.plan, trans_w=False)


# Backends


@pytest.mark.parametrize("name", ["Triton", "bogus", ""])
def test_use_backend_unknown_name(name):
    message = f"name must be one of cuda, triton, reference or None, got '{name}'"
    with pytest.raises(ValueError, match=message), use_backend(name):
        pass


def test_environment_unknown_name(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "bogus")
    with pytest.raises(ValueError, match="MOE_KERNELS_BACKEND must be one of cuda, triton, reference, got 'bogus'"):
        routing_plan(P.indices, CASE.E)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(backend):
    """On CPU tensors no GPU backend can run, with or without a GPU in the machine."""
    message = rf"combine: the forced backend .*on cpu.*{backend}: \w+"
    with use_backend(backend), pytest.raises(RuntimeError, match=message):
        torch.ops.moe_kernels.combine(*op_arguments("combine", P))


def test_a_forced_backend_is_taken_only_for_the_ops_it_has(monkeypatch):
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "cuda")
    assert "topk_route" not in backends.IMPLEMENTS["cuda"]
    topk_route(P.x[:, :4], 2)


def test_a_width_no_kernel_takes():
    problem = backends.Problem(torch.device("cpu"), torch.float32, (20,))
    choice = backends.resolve("combine", problem)
    assert choice.backend == "reference"
    assert [backend for backend, _ in choice.passed_over] == ["cuda", "triton"]
    assert all(reason for _, reason in choice.passed_over)


def test_use_backend_nests_and_restores():
    assert backends.forced_backend() is None
    with use_backend("reference"):
        with use_backend("triton"):
            assert backends.forced_backend() == "triton"
            with use_backend(None):
                assert backends.forced_backend() is None
        assert backends.forced_backend() == "reference"
    assert backends.forced_backend() is None
