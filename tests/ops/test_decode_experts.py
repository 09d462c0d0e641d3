import pytest
import torch

from tests.helpers import (
    LAYOUTS,
    Case,
    Problem,
    assert_close,
    bitwise_equal,
    doubled,
    naive_moe,
    odd_rows,
    op_arguments,
    shifted,
)

OP = "decode_experts"

CASES = [
    Case(1, 8, 64, 256, 72),  # fewer rows than experts: a block belongs to a row
    Case(1, 1, 1, 8, 8),
    Case(0, 2, 4, 64, 8),
    Case(8, 8, 128, 264, 40),
    Case(7, 4, 64, 64, 200, routing="duplicates"),
    Case(40, 2, 4, 328, 136),  # a pass and a part of one
    Case(256, 8, 128, 64, 64),  # as many rows as it takes
    Case(100, 3, 9, 200, 72, routing="sentinels"),
    Case(90, 2, 4, 72, 24, routing="all_to_one"),  # more rows than a pass
    Case(17, 2, 4, 40, 8, routing="all_dropped"),
]
TABLE = pytest.mark.parametrize("case", CASES, ids=str)
SMALL = Case(9, 2, 6, 136, 72)


def run(p, *, bias=True, **changed):
    names = ("x", "indices", "weights", "w_gate_up", "b_gate_up", "w_down", "b_down", "activation", "alpha", "limit",
             "interleaved")  # fmt: skip
    arguments = dict(zip(names, op_arguments(OP, p), strict=True))
    if not bias:
        arguments |= {"b_gate_up": None, "b_down": None}
    return torch.ops.moe_kernels.decode_experts(*(arguments | changed).values())


def check(p, out, bias=True, weights=None):
    tensors = [p.x, p.weights if weights is None else weights, p.w_gate_up, p.w_down]
    biases = [p.bias_gate_up, p.bias_down] if bias else [None, None]

    def naive(x, weights, w_gate_up, w_down, b_gate_up, b_down):
        return naive_moe(
            x, weights, p.indices, w_gate_up, w_down, p.case.activation, b_gate_up, b_down, p.case.interleaved
        )

    assert_close(out, naive(*doubled(*tensors, *biases)), naive(*tensors, *biases))


@TABLE
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_values(target, case, bias):
    p = Problem(case, target.device, target.dtype)
    check(p, run(p, bias=bias), bias)


@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
def test_activations(target, activation, interleaved):
    p = Problem(SMALL._replace(activation=activation, interleaved=interleaved), target.device, target.dtype)
    check(p, run(p))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_index_types_and_weights_of_another_dtype(target, ids):
    p = Problem(SMALL, target.device, target.dtype)
    weights = p.weights.float() * 1.01
    check(p, run(p, indices=p.indices.to(ids), weights=weights), weights=weights.to(target.dtype))


def test_a_dropped_slots_weight_may_be_anything(target):
    p = Problem(CASES[7], target.device, target.dtype)
    dropped = (p.indices < 0) | (p.indices >= p.case.E)
    assert dropped.any()
    weights = torch.where(dropped, torch.nan, p.weights)
    assert bitwise_equal(run(p, weights=weights), run(p))


def test_strided_inputs(target):
    """Weights of one layer out of a stack, tokens out of a wider buffer."""
    p = Problem(SMALL, target.device, target.dtype)
    x = torch.cat([p.x, p.x], 1)[:, : p.case.D]
    w_gate_up = torch.stack([p.w_gate_up, -p.w_gate_up], 1)[:, 0]
    w_down = torch.stack([p.w_down, -p.w_down], 1)[:, 0]
    assert not x.is_contiguous() and not w_down.is_contiguous()
    assert bitwise_equal(run(p, x=x, w_gate_up=w_gate_up, w_down=w_down), run(p))


@pytest.mark.parametrize("place", [shifted, odd_rows])
@pytest.mark.parametrize("case", [SMALL, CASES[0]], ids=str)  # a block belongs to an expert, to a row
def test_inputs_that_are_not_aligned(target, case, place):
    p = Problem(case, target.device, target.dtype)
    names = ("x", "indices", "weights", "w_gate_up", "w_down")
    placed = {name: place(getattr(p, name)) for name in names}
    check(p, run(p, **placed, b_gate_up=place(p.bias_gate_up), b_down=place(p.bias_down)))


def test_reruns_are_bitwise_equal(target):
    p = Problem(CASES[5], target.device, target.dtype)
    first = run(p)
    assert all(bitwise_equal(run(p), first) for _ in range(3))


def test_too_many_rows(target):
    p = Problem(Case(1025, 2, 4, 8, 8), target.device, target.dtype)
    with pytest.raises(ValueError, match=r"expert_indices must be of at most 2048 elements, got .*\[1025, 2\]"):
        run(p)
