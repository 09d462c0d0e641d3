"""What the tests of moe_experts share: its six differentiable inputs by name, the call, the truth, the gradients."""

import pytest
import torch

from moe_kernels.functional import moe_experts
from tests.helpers import Case, naive_moe

NAMES = ("x", "weights", "w_gate_up", "w_down", "bias_gate_up", "bias_down")
RECOMPUTE = [None, "pre_activation"]
BOTH = pytest.mark.parametrize("recompute", RECOMPUTE, ids=["save-h", "recompute"])
SMALL = Case(13, 2, 4, 8, 5, block_m=16)
WIDE = Case(40, 2, 4, 64, 40, block_m=16)


def inputs_of(p, bias=True, frozen=()):
    """The six differentiable inputs of a problem, by name, as fresh leaves."""
    names = NAMES if bias else NAMES[:4]
    return {name: getattr(p, name).detach().clone().requires_grad_(name not in frozen) for name in names}


def run(p, inputs, recompute=None, plan=None, **options):
    return moe_experts(
        inputs["x"],
        inputs["weights"],
        p.plan if plan is None else plan,
        inputs["w_gate_up"],
        inputs["w_down"],
        activation=p.case.activation,
        bias_gate_up_E2I=inputs.get("bias_gate_up"),
        bias_down_ED=inputs.get("bias_down"),
        recompute=recompute,
        **options,
        **dict(zip(("alpha", "limit", "interleaved"), p.case.options)),
    )


def naive(p, inputs):
    x, weights, w_gate_up, w_down, *biases = inputs.values()
    bias_gate_up, bias_down = biases or (None, None)
    how = p.case.activation, bias_gate_up, bias_down, p.case.interleaved
    return naive_moe(x, weights, p.indices, w_gate_up, w_down, *how)


def gradients(out, inputs, d_out, **kwargs):
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return dict(zip(inputs, torch.autograd.grad(out, wanted, d_out, **kwargs)))
