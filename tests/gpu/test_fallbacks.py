"""The whole layer at widths that no kernel takes, or not the fastest: what runs instead, and right values.

The same choices without a GPU, op by op: tests/backends/test_choice.py.
"""

import collections
import re

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.bench.ops import Choices
from tests.gpu import hopper
from tests.gpu.test_moe_experts import DTYPES, NAMES, layer, leaves, step
from tests.helpers import Case, Problem, assert_close, naive_moe

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
STEP = ("gate_up", "grouped_gemm", "combine", "d_activation", "grouped_wgrad")


def definition(p, inputs):
    x, weights, w_gate_up, w_down, *biases = inputs
    return naive_moe(x, weights, p.indices, w_gate_up, w_down, p.case.activation, *biases, p.case.interleaved)


def check_step(case, dtype) -> dict[str, set[str]]:
    """A forward and a backward against the layer's definition; which backends ran each op."""
    p = Problem(case, "cuda", dtype)
    with Choices() as choices:
        found = step(p, leaves(p))

    def expected(inputs):
        out = definition(p, inputs)
        return [out, *torch.autograd.grad(out, inputs, p.d_out.to(out.dtype))]

    truth, plain = expected(leaves(p, torch.float64)), expected(leaves(p))
    for name, ours, true, torchs in zip(("output", *NAMES), found, truth, plain, strict=True):
        assert_close(ours, true, torchs, name)
    ran = collections.defaultdict(set)
    for op, backend in choices.made:
        ran[op].add(backend)
    return ran


UNALIGNED = Case(40, 2, 4, 12, 20, block_m=16)


@DTYPES
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_widths_that_are_no_multiples_of_8(activation, dtype):
    """The reference, plain torch."""
    ran = check_step(UNALIGNED._replace(activation=activation), dtype)
    assert ran == {op: {"reference"} for op in STEP}


@DTYPES
@pytest.mark.parametrize("tokens", [4, 40])
def test_few_tokens_of_such_widths(tokens, dtype):
    """Given indices and no gradient: not by the op for few tokens, which has no kernel for them."""
    p = Problem(UNALIGNED._replace(T=tokens), "cuda", dtype)
    inputs = leaves(p)
    with torch.no_grad(), Choices() as choices:
        out = layer(p, inputs, plan=p.indices)
    (plan, of_the_plan), *rest = choices.made
    assert plan == "routing_plan" and of_the_plan != "reference", "which has no widths"
    assert rest == [(op, "reference") for op in ("gate_up", "grouped_gemm", "combine")]
    with torch.no_grad():
        assert_close(out, definition(p, leaves(p, torch.float64)), definition(p, inputs))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("D, I", [(12, 24), (24, 20)])
def test_a_forced_backend_says_why_not(backend, D, I):  # noqa: E741  the library's letter
    p = Problem(UNALIGNED._replace(D=D, I=I), "cuda", BF16)
    reason = f"width {12 if D == 12 else 20} is not a multiple of 8"
    if (other := backends.why_not(backend, "gate_up", backends.Problem(p.x.device, BF16, (64, 64), 128))) is not None:
        pytest.skip(other)
    message = f"gate_up: {backends.DECLINED} .*" + re.escape(f"({backend}: {reason})")
    with use_backend(backend), pytest.raises(RuntimeError, match=message):
        layer(p, leaves(p))


def test_a_hidden_size_that_the_hopper_kernels_do_not_gather():
    """D is a multiple of 8, not of 64: Triton makes the two products that gather rows of it, the rest is as ever."""
    if (reason := hopper.why_not()) is not None:
        pytest.skip(reason)
    ran = check_step(Case(300, 2, 2, 200, 72, block_m=128), BF16)
    assert ran == {op: {"triton" if op in ("gate_up", "d_activation") else "cuda"} for op in STEP}
