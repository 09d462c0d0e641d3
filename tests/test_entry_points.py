"""What the entry points of ``moe_kernels._C`` rely on, they check: ValueError before anything is launched.

The ops' own checks say it better, these are for who calls ``_C``. They need no GPU, but the extension.
"""

import re

import pytest

from tests.nvcc import CSRC

AT = 1 << 20  # an aligned address: nobody follows it
ACTIVATION = {"activation": 0, "alpha": 0.0, "limit": 0.0, "interleaved": False}


def weights(rows, columns):
    return {"data": AT, "rows": rows, "columns": columns, "row_stride": columns, "expert_stride": rows * columns}


def of_every_gpu(c) -> dict[str, dict]:
    """Arguments that every entry point of the generic kernels takes."""
    rows = {"positions": AT, "weights": AT, "weights_dtype": c.FLOAT32, "tokens": 4, "top_k": 3, "width": 64}
    rows |= {"dtype": c.BFLOAT16, "stream": 0}
    router = {"logits": AT, "logits_stride": 64, "logits_dtype": c.BFLOAT16, "indices": AT, "tokens": 4}
    router |= {"num_experts": 64, "top_k": 4, "stream": 0}
    router["rule"] = {
        **{"scoring": c.SCORINGS["sigmoid"], "after": False, "renormalize": True, "epsilon": 0.0, "scale": 1.0},
        **{"min_sum": 0.0, "soft_cap": 0.0, "step": c.FLOAT32},
    }
    return {
        "combine": {
            "out": AT,
            "out_stride": 64,
            "y": AT,
            "y_stride": 64,
            "residual": AT,
            "residual_stride": 64,
            **rows,
        },
        "permute": {"out": AT, "x": AT, "x_stride": 64, "offsets": AT, "num_experts": 2, **rows},
        "routing_plan": {
            **{"indices": AT, "index_bytes": 8, "num_slots": 12, "num_experts": 4, "block_m": 16, "num_tiles": 4},
            **{"num_sms": 132, "workspace": AT, "offsets": AT, "slots": AT, "positions": AT, "tiles": AT, "stream": 0},
        },
        "topk_route": {
            **{"weights": AT, "weights_dtype": c.FLOAT32, "bias": AT, "bias_dtype": c.FLOAT32, **router},
            **{"num_groups": 1, "top_groups": 1, "group_max": False, "losers_zero": False, "step_choice": c.FLOAT32},
        },
        "topk_route_bwd": {
            **{"d_logits": AT, "d_logits_stride": 64, "d_weights": AT, "d_weights_dtype": c.FLOAT32, **router},
        },
        "decode_experts": {
            **{"out": AT, "a": AT, "y": AT, "x": AT, "indices": AT, "index_bytes": 8, "routing_weights": AT},
            **{"routing_weights_dtype": c.FLOAT32, "gate_up": weights(144, 128), "bias_gate_up": AT},
            **{"down": weights(128, 72), "bias_down": AT, "tokens": 4, "top_k": 3, "num_experts": 2, **ACTIVATION},
            **{"dtype": c.BFLOAT16, "num_sms": 132, "stream": 0},
        },
    }


def of_hopper(c) -> dict[str, dict]:
    """Arguments that every entry point of the Hopper kernels takes, but for a counter."""
    many = {"num_sms": 132, "counter": 0, "stream": 0}
    plan = {"offsets": AT, "slots": AT, "tiles": AT, "num_tiles": 4, "num_experts": 2, "num_rows": 12, "top_k": 3}

    down = {"inner": 72, "reduced": 128, "plan": plan, **many}
    return {
        "gate_up": {
            **{"h": AT, "a": AT, "x": AT, "x_stride": 128, "w": weights(144, 128), "across": False, "bias": AT},
            **{**ACTIVATION, **down},
        },
        "grouped_gemm": {
            **{"y": AT, "a": AT, "a_stride": 72, "w": weights(128, 72), "across": False, "width": 128, "reduced": 72},
            **{"bias": AT, "bias_stride": 128, "plan": plan, **many},
        },
        "d_activation": {
            **{"dh": AT, "a": AT, "partial": AT, "h": AT, "d_out": AT, "d_out_stride": 128, "w": weights(128, 72)},
            **{"along": False, "weights": AT, "weights_dtype": c.FLOAT32, **ACTIVATION, **down},
        },
        "grouped_wgrad": {
            **{"dw": AT, "dw_dtype": c.BFLOAT16, "lhs": AT, "lhs_stride": 128, "rhs": AT, "rhs_stride": 72},
            **{"m": 128, "n": 72, "gather_lhs": True, "accumulate": False, "plan": plan, **many},
        },
        "row_sums": {
            **{"sums": AT, "sums_dtype": c.FLOAT32, "rows": AT, "row_stride": 128, "width": 128, "workspace": AT},
            **{"plan": plan, "stream": 0},
        },
    }


def check(c, op, arguments, change, message):
    for name, value in change.items():
        arguments[name] = {**arguments[name], **value} if isinstance(value, dict) else value
    kinds = {"plan": "Plan", "w": "Weights", "gate_up": "Weights", "down": "Weights", "rule": "RouteRule"}
    for name, kind in kinds.items():
        if name in arguments:
            arguments[name] = getattr(c, kind)(**arguments[name])
    with pytest.raises(ValueError, match="^" + re.escape(f"{op}: ") + ".*" + re.escape(message)):
        getattr(c, op)(**arguments)


GENERIC = [  # entry point, what is changed, message
    ("combine", {"width": 12}, "width must be a positive multiple of 8 below 2**30, got 12"),
    ("combine", {"top_k": -1}, "top_k must not be negative, got -1"),
    ("combine", {"out": 8}, "out must start at a multiple of 16 bytes"),
    ("combine", {"out": 0}, "out must not be null"),
    ("combine", {"out_stride": 68}, "out must have rows that start at multiples of 16 bytes, its stride is 68"),
    ("combine", {"y": 2}, "y must start at a multiple of 16 bytes"),
    ("combine", {"y_stride": 67}, "y must have rows that start at multiples of 16 bytes, its stride is 67"),
    ("combine", {"residual": 8}, "residual must start at a multiple of 16 bytes"),
    ("combine", {"residual_stride": 60}, "residual must have rows that start at multiples of 16 bytes"),
    ("combine", {"positions": 0}, "positions must not be null"),
    ("combine", {"weights": 0}, "weights must not be null"),
    ("combine", {"weights_dtype": 4}, "weights_dtype must be float32, bfloat16 or float16"),
    ("combine", {"dtype": 0}, "dtype must be float32, bfloat16 or float16"),
    ("permute", {"width": -8}, "width must be a positive multiple of 8 below 2**30, got -8"),
    ("permute", {"top_k": -1}, "top_k must not be negative, got -1"),
    ("permute", {"num_experts": 0}, "num_experts must be positive, got 0"),
    ("permute", {"out": 8}, "out must start at a multiple of 16 bytes"),
    ("permute", {"x": 4}, "x must start at a multiple of 16 bytes"),
    ("permute", {"x_stride": 67}, "x must have rows that start at multiples of 16 bytes, its stride is 67"),
    ("permute", {"offsets": 0}, "offsets must not be null"),
    ("permute", {"positions": 0}, "positions must not be null"),
    ("permute", {"weights": 0}, "weights must not be null"),
    ("permute", {"weights_dtype": 0}, "weights_dtype must be float32, bfloat16 or float16"),
    ("permute", {"dtype": 0}, "dtype must be float32, bfloat16 or float16"),
    ("routing_plan", {"num_experts": 0}, "num_experts must be from 1 to 4096, got 0"),
    ("routing_plan", {"num_experts": 4097}, "num_experts must be from 1 to 4096, got 4097"),
    ("routing_plan", {"num_slots": 2**31}, "num_slots must be from 0 to 2**31 - 1, got 2147483648"),
    ("routing_plan", {"num_slots": -1}, "num_slots must be from 0 to 2**31 - 1, got -1"),
    ("routing_plan", {"block_m": 0}, "block_m must be positive, got 0"),
    ("routing_plan", {"index_bytes": 2}, "index_bytes must be 4 or 8, got 2"),
    ("routing_plan", {"num_sms": 0}, "num_sms must be positive, got 0"),
    ("routing_plan", {"num_slots": 100_000, "workspace": 8}, "workspace must start at a multiple of 16 bytes"),
    ("routing_plan", {"num_slots": 100_000, "workspace": 0}, "workspace must not be null"),
    ("routing_plan", {"indices": 0}, "indices must not be null"),
    ("routing_plan", {"offsets": 0}, "offsets must not be null"),
    ("routing_plan", {"slots": 0}, "slots must not be null"),
    ("routing_plan", {"positions": 0}, "positions must not be null"),
    ("routing_plan", {"tiles": 0}, "tiles must not be null"),
    ("routing_plan", {"num_tiles": 3}, "num_tiles must be at least 4, got 3"),
    ("topk_route", {"num_experts": 1025}, "num_experts must be from 1 to 1024, got 1025"),
    ("topk_route", {"top_k": 0}, "top_k must be from 1 to 32 and at most num_experts, got 0"),
    ("topk_route", {"top_k": 33}, "top_k must be from 1 to 32 and at most num_experts, got 33"),
    ("topk_route", {"num_experts": 3}, "top_k must be from 1 to 32 and at most num_experts, got 4"),
    ("topk_route", {"num_groups": 5}, "num_groups must divide num_experts"),
    ("topk_route", {"num_groups": 0}, "num_groups must divide num_experts"),
    ("topk_route", {"top_groups": 0}, "top_groups must be from 1 to num_groups, got 0"),
    ("topk_route", {"top_groups": 2}, "top_groups must be from 1 to num_groups, got 2"),
    ("topk_route", {"rule": {"scoring": 3}}, "no scoring 3"),
    ("topk_route", {"rule": {"step": 0}}, "step must be float32, bfloat16 or float16"),
    ("topk_route", {"step_choice": 0}, "step_choice must be float32, bfloat16 or float16"),
    ("topk_route", {"weights_dtype": 0}, "weights_dtype must be float32, bfloat16 or float16"),
    ("topk_route", {"logits_dtype": -1}, "logits_dtype must be float32, bfloat16 or float16"),
    ("topk_route", {"bias_dtype": 0}, "bias_dtype must be float32, bfloat16 or float16"),
    ("topk_route", {"weights": 0}, "weights must not be null"),
    ("topk_route", {"indices": 0}, "indices must not be null"),
    ("topk_route", {"logits": 0}, "logits must not be null"),
    ("topk_route", {"logits": 4}, "logits must have rows that start at multiples of 4 elements"),
    ("topk_route", {"logits_stride": 66}, "logits must have rows that start at multiples of 4 elements"),
    ("topk_route", {"bias": 8}, "bias must have rows that start at multiples of 4 elements"),
    ("topk_route_bwd", {"num_experts": 1025}, "num_experts must be from 1 to 1024, got 1025"),
    ("topk_route_bwd", {"top_k": 33}, "top_k must be from 1 to 32, got 33"),
    ("topk_route_bwd", {"rule": {"scoring": -1}}, "no scoring -1"),
    ("topk_route_bwd", {"logits_dtype": 4}, "logits_dtype must be float32, bfloat16 or float16"),
    ("topk_route_bwd", {"d_weights_dtype": 0}, "d_weights_dtype must be float32, bfloat16 or float16"),
    ("topk_route_bwd", {"d_weights": 0}, "d_weights must not be null"),
    ("topk_route_bwd", {"indices": 0}, "indices must not be null"),
    ("topk_route_bwd", {"logits": 4}, "logits must have rows that start at multiples of 4 elements"),
    ("topk_route_bwd", {"d_logits": 0}, "d_logits must not be null"),
    ("topk_route_bwd", {"d_logits_stride": 63}, "d_logits must have rows that start at multiples of 4 elements"),
    ("decode_experts", {"tokens": 700}, "tokens * top_k must be in 1..2048, got 700 * 3"),
    ("decode_experts", {"top_k": 0}, "tokens * top_k must be in 1..2048, got 4 * 0"),
    (
        "decode_experts",
        {"gate_up": {"columns": 132}},
        "hidden must be a positive multiple of 8 below 2**30, got 132",
    ),
    ("decode_experts", {"down": {"columns": 0}}, "inner must be a positive multiple of 8 below 2**30, got 0"),
    ("decode_experts", {"num_experts": 0}, "num_experts must be positive, got 0"),
    ("decode_experts", {"num_sms": 0}, "num_sms must be positive, got 0"),
    ("decode_experts", {"indices": 0}, "indices must not be null"),
    ("decode_experts", {"routing_weights": 0}, "routing_weights must not be null"),
    ("decode_experts", {"routing_weights_dtype": 0}, "routing_weights_dtype must be float32, bfloat16 or float16"),
    ("decode_experts", {"activation": 10}, "no activation 10"),
    ("decode_experts", {"x": 8}, "x must start at a multiple of 16 bytes"),
    ("decode_experts", {"a": 0}, "a must not be null"),
    ("decode_experts", {"y": 2}, "y must start at a multiple of 16 bytes"),
    ("decode_experts", {"out": 4}, "out must start at a multiple of 16 bytes"),
    ("decode_experts", {"gate_up": {"rows": 72}}, "w must be [E, 144, 128], got [E, 72, 128]"),
    ("decode_experts", {"gate_up": {"data": 8}}, "w must start at a multiple of 16 bytes"),
    ("decode_experts", {"gate_up": {"row_stride": 132}}, "w must have rows that start at multiples of 16 bytes"),
    ("decode_experts", {"down": {"rows": 64}}, "w must be [E, 128, 72], got [E, 64, 72]"),
    ("decode_experts", {"down": {"expert_stride": 3}}, "w must have rows that start at multiples of 16 bytes"),
    (
        "decode_experts",
        {"activation": 9, "interleaved": True, "gate_up": {"rows": 72}},
        "interleaved needs a gated activation",
    ),
    ("decode_experts", {"index_bytes": 2}, "index_bytes must be 4 or 8, got 2"),
    ("decode_experts", {"dtype": 1}, "dtype must be bfloat16 or float16"),
]


@pytest.mark.parametrize("op, change, message", GENERIC)
def test_generic_kernels(op, change, message):
    c = pytest.importorskip("moe_kernels._C")
    check(c, op, of_every_gpu(c)[op], change, message)


HOPPER = [  # entry point, what is changed, message
    ("gate_up", {"inner": 76}, "inner must be a positive multiple of 8 below 2**30, got 76"),
    ("gate_up", {"reduced": 72}, "reduced must be a positive multiple of 64 below 2**30, got 72"),
    ("gate_up", {"reduced": 0}, "reduced must be a positive multiple of 64 below 2**30, got 0"),
    ("gate_up", {"x": 8}, "x must start at a multiple of 16 bytes"),
    ("gate_up", {"x": 0}, "x must not be null"),
    ("gate_up", {"x_stride": 131}, "x must have rows that start at multiples of 16 bytes, its stride is 131"),
    ("gate_up", {"h": 0, "a": 0}, "h and a must not both be null"),
    ("gate_up", {"plan": {"slots": 0}}, "slots must not be null"),
    ("gate_up", {"plan": {"top_k": 0}}, "num_rows must be a positive multiple of top_k, got 12 and 0"),
    ("gate_up", {"plan": {"top_k": 5}}, "num_rows must be a positive multiple of top_k, got 12 and 5"),
    ("gate_up", {"w": {"rows": 72}}, "w must be [E, 144, 128], got [E, 72, 128]"),
    ("gate_up", {"across": True}, "w must be [E, 128, 144], got [E, 144, 128]"),
    ("gate_up", {"bias": 4}, "bias must start at a multiple of 16 bytes"),
    ("gate_up", {"activation": 9}, "w must be [E, 72, 128], got [E, 144, 128]"),
    ("gate_up", {"activation": 9, "interleaved": True, "w": {"rows": 72}}, "interleaved needs a gated activation"),
    ("gate_up", {"activation": 10, "w": {"rows": 72}}, "no activation 10"),
    ("grouped_gemm", {"reduced": 76}, "reduced must be a positive multiple of 8 below 2**30, got 76"),
    ("grouped_gemm", {"width": 0}, "width must be a positive multiple of 8 below 2**30, got 0"),
    ("grouped_gemm", {"across": True}, "w must be [E, 72, 128], got [E, 128, 72]"),
    ("grouped_gemm", {"w": {"expert_stride": 3}}, "w must have rows that start at multiples of 16 bytes"),
    ("grouped_gemm", {"bias": 4}, "bias must start at a multiple of 16 bytes"),
    ("grouped_gemm", {"bias_stride": 12}, "bias must have rows that start at multiples of 16 bytes"),
    ("grouped_gemm", {"plan": {"tiles": 0}}, "tiles must not be null"),
    ("grouped_gemm", {"plan": {"num_experts": 0}}, "num_experts must be positive, got 0"),
    ("d_activation", {"reduced": 136}, "reduced must be a positive multiple of 64 below 2**30, got 136"),
    ("d_activation", {"h": 2}, "h must start at a multiple of 16 bytes"),
    ("d_activation", {"along": True}, "w must be [E, 72, 128], got [E, 128, 72]"),
    ("d_activation", {"activation": 6, "interleaved": True}, "interleaved needs a gated activation"),
    ("d_activation", {"activation": -1}, "no activation -1"),
    ("d_activation", {"partial": 0}, "partial must not be null"),
    ("d_activation", {"weights_dtype": 0}, "weights_dtype must be float32, bfloat16 or float16"),
    ("grouped_wgrad", {"m": 12}, "m must be a positive multiple of 8 below 2**30, got 12"),
    ("grouped_wgrad", {"dw_dtype": 3}, "dw_dtype must be bfloat16 or float32"),
    ("grouped_wgrad", {"lhs_stride": 2**31}, "rows less than 2**31 elements apart"),
    ("grouped_wgrad", {"n": 2**23}, "m and n must be at most 2**22, got 128 and 8388608"),
    ("grouped_wgrad", {"plan": {"offsets": 0}}, "offsets must not be null"),
    ("row_sums", {"width": 12}, "width must be a positive multiple of 8 below 2**30, got 12"),
    ("row_sums", {"rows": 8}, "rows must start at a multiple of 16 bytes"),
    ("row_sums", {"row_stride": 4}, "rows must have rows that start at multiples of 16 bytes, its stride is 4"),
    ("row_sums", {"sums": 0}, "sums must not be null"),
    ("row_sums", {"workspace": 0}, "workspace must not be null"),
    ("row_sums", {"sums_dtype": 3}, "sums_dtype must be bfloat16 or float32"),
    ("row_sums", {"plan": {"offsets": 0}}, "offsets must not be null"),
]


@pytest.mark.parametrize("op, change, message", HOPPER)
def test_hopper_kernels(op, change, message):
    c = pytest.importorskip("moe_kernels._C")
    if not c.sm90:
        pytest.skip("built without the Hopper kernels")
    check(c, op, of_hopper(c)[op], change, message)


def test_every_entry_point_is_tested():
    """By name, on any machine: all that is bound and launches something."""
    bound = set(re.findall(r'm\.def\(\s*"(\w+)"', (CSRC / "bindings.cpp").read_text()))
    asking = ("driver_version", "_workspace", "_tile_columns", "_takes_tall")
    launching = {name for name in bound if not name.endswith(asking)}
    assert launching == {op for op, *_ in GENERIC + HOPPER}


def of_sm90():
    c = pytest.importorskip("moe_kernels._C")
    if not c.sm90:
        pytest.skip("built without the Hopper kernels")
    return c


@pytest.mark.parametrize(
    "width, reduced, along, across",
    [
        (2048, 768, 208, 192),  # Qwen3-30B's down
        (2048, 1536, 208, 192),  # its dX
        (4096, 14336, 256, 256),  # Mixtral's: 2 % isn't to be saved
        (7168, 4096, 208, 256),  # DeepSeek-V3's dX: 35 tiles of 208, or 38 of 192
        (256, 64, 256, 256),  # one tile fits, two would not
        (832, 128, 208, 192),
        (576, 128, 192, 192),  # what tests/gpu/hopper.py has of either kind
    ],
)
def test_tiles_of_products(width, reduced, along, across):
    c = of_sm90()
    assert c.grouped_gemm_tile_columns(width=width, reduced=reduced, across=False) == along
    assert c.grouped_gemm_tile_columns(width=width, reduced=reduced, across=True) == across


@pytest.mark.parametrize(
    "gathered, contiguous, tall",  # docs/kernels.md, version 10
    [
        *[(2048, 1536, True), (2048, 768, True), (4096, 28672, True), (2880, 5760, True), (2880, 2880, True)],
        *[(7168, 4096, True), (2048, 5120, True), (2048, 2048, True), (2048, 1024, False), (2048, 512, False)],
        *[(1536, 512, False), (1536, 256, False), (768, 2048, False), (768, 256, False)],
    ],
)
def test_tiles_of_weight_gradients(gathered, contiguous, tall):
    assert of_sm90().grouped_wgrad_takes_tall(gathered_width=gathered, contiguous_width=contiguous) is tall
