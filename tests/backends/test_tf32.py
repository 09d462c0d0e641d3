"""float32 products follow torch's TF32 settings, whichever of its two APIs they were made through."""

import pytest
import torch

from tests.helpers import Case, Problem, op_arguments, relative_l2

OP = "grouped_gemm"  # what `target` asks about
MATMUL = torch.backends.cuda.matmul
#: A TF32 operand has a 10-bit mantissa: relative rounding of 2**-11, twice in a product; ten times that.
TF32 = 1e-2


@pytest.fixture(autouse=True)
def _restored():
    """The two APIs refuse to be mixed: both must be back at the default for the tests that follow."""
    before = MATMUL.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest", "the other API answers again"


def new_api(value):
    MATMUL.fp32_precision = value


SETTINGS = [
    (lambda: None, "ieee"),
    (lambda: new_api("ieee"), "ieee"),
    (lambda: new_api("tf32"), "tf32"),
    (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
]


@pytest.mark.parametrize(
    "setting,expected", SETTINGS, ids=["default", "new-ieee", "new-tf32", "legacy-highest", "legacy-high"]
)
def test_input_precision(setting, expected):
    launch = pytest.importorskip("moe_kernels.backends.triton._launch")
    setting()
    assert launch.input_precision(torch.float32) == expected
    assert launch.input_precision(torch.bfloat16) == "ieee"


#: Where the argument is that an op writes to.
OVER = {"d_activation_": 2, "grouped_wgrad_": 6}


@pytest.mark.parametrize("op", ["gate_up", "grouped_gemm", "d_activation", "grouped_wgrad", *OVER])
def test_products_run_after_the_new_api_allowed_tf32(op, target):
    """Reading the setting through torch's older API raises then."""
    p = Problem(Case(20, 2, 4, 32, 16, block_m=16), target.device, target.dtype)
    run = getattr(torch.ops.moe_kernels, op)
    results = []
    for setting in (lambda: None, lambda: new_api("tf32")):
        setting()
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in op_arguments(op, p)]
        out = run(*arguments)
        made = out if isinstance(out, tuple) else (out,)
        results.append([t for t in (*made, arguments[OVER[op]] if op in OVER else None) if t is not None])
    for exact, rounded in zip(*results):
        assert rounded.isfinite().all() and relative_l2(rounded, exact) <= TF32
