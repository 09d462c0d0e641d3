"""A broken contract raises before anything runs, and the message names the argument, what came and what is accepted."""

import re

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.backends import cuda
from moe_kernels.functional import grouped_gemm, moe_experts, permute, routing_plan, topk_route, unpermute
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
    "topk_route_bwd": (
        "d_weights", "logits", "indices", "scoring", "score_after_topk", "renormalize", "epsilon", "scale", "min_sum",
        "soft_cap",
    ),
    "permute": ("x", "weights", "offsets", "slots", "positions"),
    "unpermute": ("y", "positions", "weights"),
    "gate_up": (
        "x", "w_gate_up", "bias_gate_up", "offsets", "slots", "tiles", "block_m", "top_k", "activation", "store_h",
        "store_a", "alpha", "limit", "interleaved",
    ),
    "grouped_gemm": ("a", "w", "bias", "offsets", "tiles", "block_m", "trans_w"),
    "d_activation": (
        "d_out", "w_down", "h", "weights", "offsets", "slots", "tiles", "block_m", "activation", "alpha", "limit",
        "interleaved",
    ),
    "grouped_wgrad": ("lhs", "rhs", "offsets", "slots", "top_k", "gather", "sum_lhs", "out_dtype"),
    "grouped_wgrad_": ("lhs", "rhs", "offsets", "slots", "top_k", "gather", "into"),
    "combine": ("out", "y", "positions", "weights", "residual"),
    "decode_experts": (
        "x", "expert_indices", "weights", "w_gate_up", "bias_gate_up", "w_down", "bias_down", "activation",
    ),
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


def first(tensor):
    """Its first element alone."""
    return tensor[:1]


def fewer_rows(tensor):
    return tensor[:-1]


def more_rows(tensor):
    return torch.cat([tensor, tensor[:1]])


def one_more_tile(tiles):
    """Of another plan: every tile is valid in itself, there is one too many."""
    return torch.nn.functional.pad(tiles, (0, 1))


def one_tile_fewer(tiles):
    return tiles[:, :-1].contiguous()


def becomes(value, name=None):
    def replace(_):
        return value

    replace.__name__ = name or repr(value)
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
    ("topk_route", "selection_bias", becomes(torch.zeros(3), "three"), "of size 4 in dimension 0"),
    ("topk_route", "selection_bias", becomes(torch.zeros(4, 1), "column"), r"\[E\]"),
    ("topk_route", "selection_bias", becomes(torch.zeros(4, dtype=torch.int64), "longs"), "float32"),
    ("topk_route", "selection_bias", becomes(torch.zeros(4, dtype=torch.bool), "bools"), "float32"),
    ("topk_route", "selection_bias", becomes(torch.zeros(4, device="meta"), "meta"), "on cpu like logits"),
    ("topk_route", "top_k", becomes(0), "from 1 to the number of experts 4"),
    ("topk_route", "top_k", becomes(5), "from 1 to the number of experts 4"),
    ("topk_route", "scoring", becomes("tanh"), "softmax, sigmoid, sqrtsoftplus"),
    ("topk_route", "num_groups", becomes(3), "a divisor of the number of experts 4"),
    ("topk_route", "top_groups", becomes(2), "from 1 to num_groups 1"),
    ("topk_route_bwd", "d_weights", longs, "float32"),
    ("topk_route_bwd", "d_weights", flat, r"\[T, K\]"),
    ("topk_route_bwd", "d_weights", becomes(torch.zeros(6, 5), "five columns"), "of 1 to 4 columns"),
    ("topk_route_bwd", "d_weights", becomes(torch.zeros(6, 0), "no columns"), "of 1 to 4 columns"),
    ("topk_route_bwd", "logits", longs, "float32"),
    ("topk_route_bwd", "logits", flat, r"\[T, E\]"),
    ("topk_route_bwd", "logits", fewer_rows, "of size 6 in dimension 0 .T of d_weights"),
    ("topk_route_bwd", "logits", more_rows, "of size 6 in dimension 0 .T of d_weights"),
    ("topk_route_bwd", "logits", meta, "on cpu like d_weights"),
    ("topk_route_bwd", "indices", floats, "int64 or int32"),
    ("topk_route_bwd", "indices", flat, r"shaped like d_weights \[6, 2\]"),
    ("topk_route_bwd", "indices", fewer_rows, r"shaped like d_weights \[6, 2\]"),
    ("topk_route_bwd", "indices", one_more, r"shaped like d_weights \[6, 2\]"),
    ("topk_route_bwd", "indices", meta, "on cpu like d_weights"),
    ("topk_route_bwd", "scoring", becomes("tanh"), "softmax, sigmoid, sqrtsoftplus"),
    ("permute", "x", flat, r"\[T, D\]"),
    ("permute", "weights", one_more, r"of shape \[6, 2\]"),
    ("permute", "weights", meta, "on cpu like x"),
    ("permute", "weights", longs, "float32"),
    ("permute", "offsets", first, "at least 2 elements"),
    ("permute", "offsets", longs, "int32"),
    ("permute", "slots", one_more, r"R = T \* K of positions"),
    ("permute", "slots", meta, "on cpu"),
    ("permute", "positions", longs, "int32"),
    ("permute", "positions", flat, r"\[T, K\]"),
    ("permute", "positions", fewer_rows, "T of x"),
    ("unpermute", "y", one_more, r"R = T \* K of positions"),
    ("unpermute", "positions", longs, "int32"),
    ("unpermute", "y", fewer_rows, r"R = T \* K of positions"),
    ("unpermute", "weights", one_more, r"of shape \[6, 2\]"),
    ("unpermute", "weights", meta, "on cpu like y"),
    ("unpermute", "weights", longs, "float32"),
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
    ("gate_up", "tiles", one_more_tile, "12 rows by 16"),
    ("gate_up", "tiles", one_tile_fewer, "12 rows by 16"),
    ("gate_up", "tiles", meta, "on cpu"),
    ("gate_up", "block_m", becomes(17), "a power of two"),
    ("gate_up", "activation", becomes("swish"), "one of swiglu"),
    ("gate_up", "store_h", becomes("both"), "true for at least one output"),
    ("grouped_gemm", "a", flat, r"\[R, C\]"),
    ("grouped_gemm", "w", one_more, "C of a"),
    ("grouped_gemm", "w", half, "torch.float32 like a"),
    ("grouped_gemm", "bias", one_more, r"of shape \[4, 16\]"),
    ("grouped_gemm", "offsets", one_more, r"E \+ 1"),
    ("grouped_gemm", "tiles", one_more_tile, "12 rows by 16"),
    ("grouped_gemm", "tiles", one_tile_fewer, "12 rows by 16"),
    ("d_activation", "d_out", flat, r"\[T, D\]"),
    ("d_activation", "w_down", half, "torch.float32 like d_out"),
    ("d_activation", "h", lambda h: h.T.contiguous().T, "contiguous"),
    ("d_activation", "h", lambda h: h[:, :8].contiguous(), "swiglu turns into I = 8"),
    ("d_activation", "h", fewer_rows, "R"),
    ("d_activation", "weights", one_more, r"of shape \[6, 3\]"),
    ("d_activation", "weights", meta, "on cpu like d_out"),
    ("d_activation", "weights", longs, "float32"),
    ("d_activation", "slots", one_more, "R of h"),
    ("d_activation", "tiles", one_more_tile, "12 rows by 16"),
    ("d_activation", "tiles", one_tile_fewer, "12 rows by 16"),
    ("d_activation", "activation", becomes("relu"), "one of swiglu"),
    ("grouped_wgrad", "rhs", half, "torch.float32 like lhs"),
    ("grouped_wgrad", "lhs", one_more, "it is gathered"),
    ("grouped_wgrad", "rhs", one_more, "it is not gathered"),
    ("grouped_wgrad", "offsets", first, "at least 2 elements"),
    ("grouped_wgrad", "offsets", longs, "int32"),
    ("grouped_wgrad", "gather", becomes("both"), "none, lhs, rhs"),
    ("grouped_wgrad", "out_dtype", becomes(torch.int32), "floating"),
    ("grouped_wgrad_", "rhs", half, "torch.float32 like lhs"),
    ("grouped_wgrad_", "lhs", one_more, "it is gathered"),
    ("grouped_wgrad_", "gather", becomes("both"), "none, lhs, rhs"),
    ("grouped_wgrad_", "into", one_more, r"of shape \[4, 16, 8\]"),
    ("grouped_wgrad_", "into", lambda into: into.mT.contiguous().mT, "contiguous"),
    ("grouped_wgrad_", "into", half, "torch.float32 like lhs or torch.float32"),
    ("grouped_wgrad_", "into", meta, "on cpu like lhs"),
    ("combine", "out", one_more, "T of positions"),
    ("combine", "y", half, "torch.float32 like out"),
    ("combine", "positions", longs, "int32"),
    ("combine", "weights", one_more, r"of shape \[6, 2\]"),
    ("combine", "weights", meta, "on cpu like y"),
    ("combine", "weights", longs, "float32"),
    ("combine", "residual", one_more, "shaped like out"),
    ("combine", "residual", meta, "on cpu like out"),
    ("decode_experts", "x", longs, "float32"),
    ("decode_experts", "x", flat, r"\[T, D\]"),
    ("decode_experts", "expert_indices", floats, "int64 or int32"),
    ("decode_experts", "expert_indices", flat, r"\[T, K\]"),
    ("decode_experts", "expert_indices", fewer_rows, "of size 6 in dimension 0 .T of x"),
    ("decode_experts", "expert_indices", meta, "on cpu like x"),
    ("decode_experts", "expert_indices", lambda ids: ids.repeat(1, 200), "of at most 2048 elements"),
    ("decode_experts", "weights", one_more, r"of shape \[6, 2\]"),
    ("decode_experts", "weights", meta, "on cpu like x"),
    ("decode_experts", "weights", longs, "float32"),
    ("decode_experts", "w_gate_up", half, "torch.float32 like x"),
    ("decode_experts", "w_gate_up", meta, "on cpu like x"),
    ("decode_experts", "w_gate_up", flat, r"\[E, rows, columns\]"),
    ("decode_experts", "w_gate_up", becomes(torch.zeros(4, 16, 15)), "of size 16 in dimension 2"),
    ("decode_experts", "w_gate_up", becomes(torch.zeros(4, 15, 16)), "swiglu is gated"),
    ("decode_experts", "bias_gate_up", one_more, r"of shape \[4, 16\]"),
    ("decode_experts", "bias_gate_up", half, "torch.float32 like x"),
    ("decode_experts", "w_down", one_more, r"\[4, 16, 8\] to match w_gate_up and swiglu"),
    ("decode_experts", "w_down", half, "torch.float32 like x"),
    ("decode_experts", "bias_down", one_more, r"of shape \[4, 16\]"),
    ("decode_experts", "bias_down", meta, "on cpu like x"),
    ("decode_experts", "activation", becomes("swish"), "one of swiglu"),
]  # fmt: skip


NAN, INF = float("nan"), float("inf")
# (activation, alpha, limit, interleaved, argument that is at fault, what the message must say)
NUMBERS = [
    ("swiglu", 1.0, None, False, "alpha", "None: swiglu has none"),
    ("swiglu_clamp_before", 1.0, 7.0, False, "alpha", "None: swiglu_clamp_before has none"),
    ("geglu", None, 7.0, False, "limit", "None: geglu has none"),
    ("relu2", None, 7.0, False, "limit", "None: relu2 has none"),
    ("swiglu_oai", None, 7.0, False, "alpha", "a positive finite number, which swiglu_oai needs, got None"),
    ("swiglu_oai", 1.702, None, False, "limit", "a positive finite number, which swiglu_oai needs, got None"),
    ("swiglu_clamp_after", None, None, False, "limit", "a positive finite number"),
    ("swiglu_clamp_before", None, INF, False, "limit", "a positive finite number, .* got inf"),
    ("swiglu_clamp_before", None, NAN, False, "limit", "a positive finite number, .* got nan"),
    ("swiglu_clamp_before", None, -7.0, False, "limit", "a positive finite number, .* got -7.0"),
    ("swiglu_clamp_before", None, 0.0, False, "limit", "a positive finite number, .* got 0.0"),
    ("swiglu_oai", NAN, 7.0, False, "alpha", "a positive finite number, .* got nan"),
    ("silu", None, None, True, "interleaved", "False: silu has no gate, got True"),
]


@pytest.mark.parametrize("op", ["gate_up", "d_activation", "d_activation_", "decode_experts", "moe_experts"])
@pytest.mark.parametrize("activation,alpha,limit,interleaved,argument,accepted", NUMBERS)
def test_numbers_and_layout_of_an_activation(op, activation, alpha, limit, interleaved, argument, accepted):
    how = {"activation": activation, "alpha": alpha, "limit": limit, "interleaved": interleaved}
    p = Problem(CASE._replace(activation=activation))
    message = f"^{op.rstrip('_')}: {argument} must be {accepted}"
    with pytest.raises(ValueError, match=message):
        if op == "moe_experts":
            moe_experts(p.x, p.weights, p.plan, p.w_gate_up, p.w_down, **how)
        else:
            arguments = op_arguments(op, p)
            at = next(i for i, argument in enumerate(arguments) if isinstance(argument, str))
            between = arguments[at + 1 : -3]
            getattr(torch.ops.moe_kernels, op)(*arguments[:at], activation, *between, alpha, limit, interleaved)


@pytest.mark.parametrize(
    "op,argument,broken,accepted", BROKEN, ids=[f"{op}-{a}-{b.__name__[:24]}" for op, a, b, _ in BROKEN]
)
def test_op_contract(op, argument, broken, accepted):
    arguments = list(op_arguments(op, P))
    at = ARGUMENTS[op].index(argument)
    if op == "gate_up" and argument == "store_h":
        arguments[at : at + 2] = False, False
    else:
        arguments[at] = broken(arguments[at])
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(torch.ops.moe_kernels, op)(*arguments)
    message = str(error.value)
    assert message.startswith(f"{op.rstrip('_')}: "), message
    assert re.search(rf"\b{argument}\b.* must be .*{accepted}.*, got ", message), message
    if isinstance(arguments[at], torch.Tensor):
        assert str(list(arguments[at].shape)) in message, "the message says what came"


#: More rows than a tile, so that another block_m means another number of tiles
TALL = Problem(Case(24, 2, 4, 16, 8, block_m=32))


@pytest.mark.parametrize("op", ["gate_up", "grouped_gemm", "d_activation", "d_activation_"])
def test_tiles_of_another_block_m(op):
    """Tiles start where a plan of 32 rows puts them: walked 16 at a time, half of the rows would be left out."""
    arguments = list(op_arguments(op, TALL))
    arguments[ARGUMENTS[op.rstrip("_")].index("block_m")] = 16
    name = op.rstrip("_")
    with pytest.raises(ValueError, match=rf"^{name}: tiles must be of size 7 in dimension 1 \(48 rows by 16\), got "):
        getattr(torch.ops.moe_kernels, op)(*arguments)


@pytest.mark.parametrize("op", ["gate_up", "grouped_gemm", "d_activation", "d_activation_"])
@pytest.mark.parametrize("rows", [16, 64], ids=["fewer", "more"])
def test_tiles_of_another_number_of_rows(op, rows):
    """Kernels take the rows that the tiles name without another look: memory past the end would be read and written."""
    other = op_arguments(op, Problem(TALL.case._replace(T=rows // TALL.case.K)))
    arguments, name = list(op_arguments(op, TALL)), op.rstrip("_")
    at = ARGUMENTS[name].index("tiles")
    arguments[at] = other[at]
    with pytest.raises(ValueError, match=rf"^{name}: tiles must be .*\(48 rows by 32\), got "):
        getattr(torch.ops.moe_kernels, op)(*arguments)


# The functions users call

CALL = {
    "x_TD": P.x,
    "routing_weights_TK": P.weights,
    "routing": P.plan,
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
    (
        {"routing": tuple(P.plan)},
        TypeError,
        r"routing must be expert indices \[T, K\] or a RoutingPlan of them, got \(",
    ),
    ({"routing": P.indices[0]}, ValueError, r"routing must be 2-dimensional, \[T, K\], got .*\[2\]"),
    (
        {"routing": P.indices.float()},
        ValueError,
        r"expert_indices must be an int64 or int32 tensor \[T, K\], got a float32",
    ),
    ({"routing": P.indices[:3]}, ValueError, r"x must be of 3 tokens, as the routing is for, got .*\[6, 16\]"),
    ({"x_TD": P.x[None]}, ValueError, r"x must be 2-dimensional, \[T, D\], .*got .*\[1, 6, 16\]"),
    ({"x_TD": P.x.half()}, TypeError, "w_gate_up must be torch.float16 like x.*got a float32 tensor"),
    ({"x_TD": P.x.long()}, TypeError, "must be"),
    ({"x_TD": P.x[:, :8]}, ValueError, r"w_gate_up must be of size 8 in dimension 2 \(D of x\)"),
    ({"x_TD": P.x[:3]}, ValueError, r"x must be of 6 tokens, as the routing is for, got .*\[3, 16\]"),
    ({"routing_weights_TK": P.weights[:, :1]}, ValueError, r"routing_weights must be shaped like .*\[6, 2\]"),
    ({"routing_weights_TK": P.weights.to("meta")}, ValueError, "routing_weights must be on cpu like x.*on meta"),
    ({"w_gate_up_E2ID": P.w_gate_up[0]}, ValueError, "w_gate_up.* must be 3-dimensional"),
    ({"w_down_EDI": P.w_down.mT}, ValueError, r"w_down must be \[E, D, I\] = \[4, 16, 8\].*got .*\[4, 8, 16\]"),
    ({"w_down_EDI": P.w_down[:3]}, ValueError, r"w_down must be \[E, D, I\] = \[4, 16, 8\].*got .*\[3, 16, 8\]"),
    ({"w_down_EDI": P.w_down.to("meta")}, ValueError, "w_down must be on cpu like x"),
    ({"bias_gate_up_E2I": P.bias_down[:, :3]}, ValueError, r"bias_gate_up must be of shape \[4, 16\]"),
    ({"bias_down_ED": P.bias_down[:, :3]}, ValueError, r"bias_down must be of shape \[4, 16\]"),
    (
        {"routing": routing_plan(P.indices, 5)},
        ValueError,
        r"w_gate_up must be of 5 experts, as the plan is for, got .*\[4, ",
    ),
    ({"w_gate_up_E2ID": None}, TypeError, "w_gate_up must be a tensor, got None"),
    ({"w_down_EDI": [[0.0]]}, TypeError, "w_down must be a tensor, got"),
    ({"x_TD": None}, TypeError, "x must be a tensor, got None"),
    ({"x_TD": P.x[:, :0], "w_gate_up_E2ID": P.w_gate_up[..., :0]}, ValueError, "x must be .*got"),
    ({"w_gate_up_E2ID": P.w_gate_up[..., :0]}, ValueError, "w_gate_up must be .*got"),
    ({"w_gate_up_E2ID": P.w_gate_up[:, :0], "w_down_EDI": P.w_down[..., :0]}, ValueError, "w_gate_up must be .*got"),
    ({"w_down_EDI": P.w_down[..., :0]}, ValueError, "w_down must be .*got"),
    ({"w_gate_up_E2ID": P.w_gate_up[:0], "w_down_EDI": P.w_down[:0]}, ValueError, "w_gate_up must be .*got"),
    ({"bias_gate_up_E2I": P.bias_gate_up.to("meta")}, ValueError, "bias_gate_up must be on cpu like x.*on meta"),
    ({"bias_down_ED": P.bias_down.to("meta")}, ValueError, "bias_down must be on cpu like x.*on meta"),
    ({"bias_gate_up_E2I": P.bias_gate_up.half()}, TypeError, "bias_gate_up must be torch.float32 like"),
    ({"bias_down_ED": P.bias_down.half()}, TypeError, "bias_down must be torch.float32 like"),
]

#: argument of moe_experts -> its name in messages
TENSORS = {name: name.rpartition("_")[0] for name in CALL if name != "routing"}
AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])


@pytest.mark.parametrize(
    "changed,error,message", EXPERTS, ids=[f"{next(iter(c))}-{i}" for i, (c, *_) in enumerate(EXPERTS)]
)
def test_moe_experts(changed, error, message):
    with pytest.raises(error, match=message):
        moe_experts(**(CALL | changed))


def autocast_to_bf16(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@AUTOCAST
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("argument", TENSORS)
def test_moe_experts_takes_floats_only(argument, dtype, autocast):
    """Autocast casts what it is given: integers and quantised values without their scales would pass in silence."""
    with autocast_to_bf16(autocast), pytest.raises(TypeError, match=rf"{TENSORS[argument]} must be float32.*, got "):
        moe_experts(**(CALL | {argument: CALL[argument].to(dtype)}))


@AUTOCAST
@pytest.mark.parametrize("argument", ["bias_gate_up_E2I", "bias_down_ED"])
def test_a_bias_is_of_its_weights_dtype(argument, autocast):
    """Its gradient comes in the dtype of the weight's."""
    message = rf"{TENSORS[argument]} must be torch.float32 like .*, got a bfloat16"
    with autocast_to_bf16(autocast), pytest.raises(TypeError, match=message):
        moe_experts(**(CALL | {argument: CALL[argument].bfloat16()}))


@pytest.mark.parametrize("rows", [fewer_rows, more_rows], ids=["fewer", "more"])
@pytest.mark.parametrize(
    "function,tensor,name", [(grouped_gemm, P.a, "a"), (unpermute, P.y, "y")], ids=["grouped_gemm", "unpermute"]
)
def test_rows_that_are_not_the_plans(function, tensor, name, rows):
    arguments = (rows(tensor), P.w_down, P.plan) if function is grouped_gemm else (rows(tensor), P.plan)
    with pytest.raises(ValueError, match=rf"{function.__name__}: {name} must be of size 12 in dimension 0 .*, got "):
        function(*arguments)


def test_a_plan_with_another_block_m():
    plan = TALL.plan._replace(block_m=16)
    with pytest.raises(ValueError, match="grouped_gemm: tiles must be of size 7 in dimension 1"):
        grouped_gemm(TALL.a, TALL.w_down, plan)
    with pytest.raises(ValueError, match="gate_up: tiles must be of size 7 in dimension 1"):
        moe_experts(TALL.x, TALL.weights, plan, TALL.w_gate_up, TALL.w_down)


@pytest.mark.parametrize(
    "call,argument,got",
    [
        (lambda: routing_plan([[0, 1]], 4), "expert_indices", "list"),
        (lambda: routing_plan(P.indices, 4.0), "num_experts", "4.0"),
        (lambda: permute(P.x, tuple(P.plan)), "plan", "tuple"),
        (lambda: permute(P.x, None), "plan", "NoneType"),
        (lambda: unpermute(P.y, P.indices), "plan", "Tensor"),
        (lambda: grouped_gemm(P.a, P.w_down, "x"), "plan", "str"),
    ],
    ids=[
        "routing_plan-list",
        "routing_plan-float",
        "permute-tuple",
        "permute-None",
        "unpermute-indices",
        "grouped_gemm-str",
    ],
)
def test_of_another_type(call, argument, got):
    with pytest.raises(TypeError, match=rf"\b{argument} must be .*, got {got}"):
        call()


def test_meta_tensors_run_the_contract_alone():
    """The fakes are the contract: shapes come out right on the meta device, and a mismatch raises there too."""
    on_meta = {k: v.to("meta") for k, v in CALL.items() if k != "routing"}
    plan = routing_plan(P.indices.to("meta"), CASE.E)
    out = moe_experts(routing=plan, **on_meta)
    assert out.shape == P.x.shape and out.device.type == "meta"
    with pytest.raises(ValueError, match="w_down must be"):
        moe_experts(routing=plan, **on_meta | {"w_down_EDI": on_meta["w_down_EDI"].mT})


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
        ({"top_k": 2, "group_score": "mean"}, "group_score must be one of top2_sum, max, got 'mean'"),
        ({"top_k": 2, "min_sum": -1.0}, r"min_sum must be 0 \(no minimum\) or positive, got -1.0"),
        ({"top_k": 2, "soft_cap": float("nan")}, r"soft_cap must be 0 \(no cap\) or positive, got nan"),
        (
            {"top_k": 2, "weights_dtype": torch.int64},
            "weights_dtype must be a floating-point dtype or None, got torch.int",
        ),
    ],
    ids=["tiny-groups", "too-few-kept", "none-kept", "group-score", "min-sum", "soft-cap", "weights-dtype"],
)
def test_rule_of_a_router(groups, message):
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
    monkeypatch.setenv("MOE_KERNELS_BACKEND", "triton")
    assert "decode_experts" not in backends.IMPLEMENTS["triton"]
    torch.ops.moe_kernels.decode_experts(*op_arguments("decode_experts", P))


def test_a_width_no_kernel_takes():
    problem = backends.Problem(torch.device("cpu"), torch.float32, (20,))
    choice = backends.resolve("combine", problem)
    assert choice.backend == "reference"
    assert [backend for backend, _ in choice.passed_over] == ["cuda", "triton"]
    assert all(reason for _, reason in choice.passed_over)


def test_an_op_may_ask_its_backends_in_another_order(monkeypatch):
    """By what is asked for; a forced backend runs all the same."""
    declines = dict.fromkeys(backends.ORDER)
    monkeypatch.setattr(backends, "why_not", lambda backend, op, problem: declines[backend])
    resolve = backends._resolve.__wrapped__
    plain = backends.Problem(torch.device("cpu"), torch.float32, ())
    for (op, trait), order in backends.ORDER_WITH.items():
        problem = plain._replace(traits=("another", trait))
        assert sorted(order) == sorted(backends.ORDER) and op in backends.OPS
        assert resolve(op, plain, None).backend == backends.ORDER[0]
        assert resolve(op, problem, None).backend == order[0]
        assert resolve(op, problem, "cuda").backend == "cuda"
        declines[order[0]] = "not here"
        assert resolve(op, problem, None).backend == order[1]
        declines[order[0]] = None


@pytest.mark.parametrize("experts,top_k,trait", [(1032, 4, "1032 experts"), (64, 40, "top_k 40")])
def test_routers_beyond_the_cuda_kernel(monkeypatch, experts, top_k, trait):
    monkeypatch.setattr(cuda._extension, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "_device", lambda device: None)
    monkeypatch.setattr(cuda._extension, "dtype_codes", lambda: {torch.float32: 1})
    rule = "softmax", False, False, 0.0, 1.0
    with use_backend("cuda"), pytest.raises(RuntimeError, match=f"no kernel for {trait}"):
        torch.ops.moe_kernels.topk_route(torch.zeros(2, experts), None, top_k, *rule, 1, 1)
    indices = torch.arange(top_k).expand(2, top_k)
    with use_backend("cuda"), pytest.raises(RuntimeError, match=f"no kernel for {trait}"):
        torch.ops.moe_kernels.topk_route_bwd(torch.zeros(2, top_k), torch.zeros(2, experts), indices, *rule)


def test_use_backend_nests_and_restores():
    assert backends.forced_backend() is None
    with use_backend("reference"):
        with use_backend("triton"):
            assert backends.forced_backend() == "triton"
            with use_backend(None):
                assert backends.forced_backend() is None
        assert backends.forced_backend() == "reference"
    assert backends.forced_backend() is None
