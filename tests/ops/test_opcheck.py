"""Schemas, fakes and functionalisation: ``torch.library.opcheck`` on every op, and fakes against real outputs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_kernels import use_backend
from tests.helpers import OPS, Case, Problem, op_arguments

# No dropped slots here: opcheck compares outputs, and the rows of dropped slots are not written.
CASES = [
    Case(33, 2, 4, 24, 16, block_m=16),
    Case(20, 3, 5, 40, 8, "relu2", block_m=16),
    Case(20, 3, 5, 40, 8, "swiglu_oai", block_m=16, interleaved=True),
    Case(1, 1, 2, 8, 8, block_m=16),
    Case(0, 2, 4, 24, 16, block_m=16),
]
EVERY_OP = pytest.mark.parametrize("op", OPS)


def overload(op):
    return getattr(torch.ops.moe_kernels, op).default


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


@EVERY_OP
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_opcheck(op, case):
    torch.library.opcheck(overload(op), op_arguments(op, Problem(case)))


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_matches_real(op, case, dtype):
    arguments = op_arguments(op, Problem(case, dtype=dtype))
    real = overload(op)(*arguments)
    with FakeTensorMode() as mode:
        fake = overload(op)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))

    def facts(outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [o if o is None else (tuple(o.shape), o.dtype, o.device, o.stride()) for o in outputs]

    assert facts(fake) == facts(real)


@pytest.mark.parametrize("store_h,store_a", [(True, False), (False, True)], ids=["only-h", "only-a"])
@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_fake_of_a_left_out_output(activation, store_h, store_a):
    p = Problem(CASES[0]._replace(activation=activation))
    *arguments, _, _, alpha, limit, interleaved = op_arguments("gate_up", p)
    arguments = (*arguments, store_h, store_a, alpha, limit, interleaved)
    torch.library.opcheck(torch.ops.moe_kernels.gate_up.default, arguments)


def test_every_op_of_the_library_is_checked_here():
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutograd")
    # add_to_grad_ has a weight's .grad for its output: tests/functional/test_accumulate_grad_compile.py
    ours = {n.partition("::")[2] for n in names if n.startswith("moe_kernels::")}
    assert ours - {"add_to_grad_"} == set(OPS)
