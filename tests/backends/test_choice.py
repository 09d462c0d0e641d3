"""What runs where the CUDA kernels can't: another backend, by default; a forced one says why, op by op."""

import re

import pytest
import torch

from moe_kernels import backends, use_backend
from moe_kernels.bench.ops import Choices
from moe_kernels.ops import _library
from tests.functional.experts import gradients, inputs_of, naive, run
from tests.helpers import OPS, Case, Problem, assert_close, op_arguments

BF16 = torch.bfloat16
ON_GPU = backends.Problem(torch.device("cuda"), BF16, (64, 64))


@pytest.fixture
def gpu(extension, monkeypatch):
    """``gpu(9, 0)``: as if a GPU of that compute capability were here, as far as ``supports`` looks."""
    pytest.importorskip("triton")

    def of(*capability):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    of(9, 0)
    return of


@pytest.fixture
def anywhere(gpu, monkeypatch):
    """And as if tensors on the CPU were on it, to choose by what an op is really called with; no kernel can run."""
    for backend in ("cuda", "triton"):
        monkeypatch.setattr(f"moe_kernels.backends.{backend}._device", lambda device: None)


def refused(op: str, backend: str, reason: str):
    """A forced backend's error."""
    return pytest.raises(RuntimeError, match=re.escape(f"{op}: {backends.DECLINED} ") + ".*" + re.escape(reason))


# The machine


@pytest.mark.parametrize(
    "capability, compiled, runs",
    [
        ((9, 0), "100,120", "triton"),
        ((8, 6), "90", "triton"),
        ((11, 0), "90,100,120", "triton"),
        ((7, 5), "80,90", "reference"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["combine", "gate_up", "routing_plan"])
def test_an_architecture_that_is_not_compiled_in(extension, gpu, capability, compiled, runs, op):
    extension.architectures = compiled
    gpu(*capability)
    problem = ON_GPU._replace(dtype=None, dims=()) if op == "routing_plan" else ON_GPU
    major, minor = capability
    reason = f"compute capability {major}.{minor} is not among the compiled ones ({compiled})"
    assert backends.why_not("cuda", op, problem) == reason
    choice = backends.resolve(op, problem)
    assert choice.backend == runs and choice.passed_over[0] == ("cuda", reason)
    with use_backend("cuda"), refused(op, "cuda", f"(cuda: {reason})"):
        backends.resolve(op, problem)


TOO_OLD = "the driver serves CUDA 12.8, but the extension was built with CUDA 13.0 and needs driver 580 or newer"


@pytest.mark.parametrize("driver, reason", [(0, "no NVIDIA driver was found"), (12080, TOO_OLD)])
@pytest.mark.parametrize("op", OPS)
def test_a_driver_that_is_too_old(extension, gpu, driver, reason, op):
    extension.driver_version = staticmethod(lambda: driver)
    arguments = op_arguments(op, Problem(Case(6, 2, 4, 16, 8, block_m=16)))
    name = op.removesuffix("_")
    with use_backend("cuda"), refused(name, "cuda", f"(cuda: {reason})"):
        getattr(torch.ops.moe_kernels, op)(*arguments)
    choice = backends.resolve(name, ON_GPU)
    assert choice.passed_over[0] == ("cuda", reason)
    assert choice.backend == ("triton" if name in backends.IMPLEMENTS["triton"] else "reference")


# Widths

UNALIGNED = Case(40, 2, 4, 12, 20, block_m=16)
WITHOUT_WIDTHS = ("routing_plan", "topk_route", "topk_route_bwd")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D, I", [(12, 20), (12, 24), (24, 20)])
def test_widths_that_no_kernel_takes(anywhere, D, I, op):  # noqa: E741  the library's letter
    """Those that the op reads or writes, found in what it is called with."""
    arguments = op_arguments(op, Problem(UNALIGNED._replace(D=D, I=I)))
    choice = _library.choice(op, *arguments)
    if op in WITHOUT_WIDTHS or (op in ("permute", "unpermute", "combine") and D % 8 == 0):
        assert choice.backend == "cuda"
        return
    assert choice.backend == "reference"
    assert [backend for backend, _ in choice.passed_over] == ["cuda", "triton"]
    for backend, reason in choice.passed_over:
        if op in backends.IMPLEMENTS[backend]:
            assert reason == f"width {12 if D == 12 else 20} is not a multiple of 8"


def test_a_layer_of_widths_that_no_kernel_takes(anywhere):
    p = Problem(UNALIGNED)
    inputs = inputs_of(p)
    with Choices() as choices:
        out = run(p, inputs)
        found = {"output": out, **gradients(out, inputs, p.d_out)}
    assert {backend for _, backend in choices.made} == {"reference"}
    assert {op for op, _ in choices.made} == {"gate_up", "grouped_gemm", "combine", "d_activation", "grouped_wgrad"}
    truths = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    out = naive(p, truths)
    for name, truth in {"output": out, **gradients(out, truths, p.d_out.double())}.items():
        assert_close(found[name], truth, what=name)
    for forced in ("cuda", "triton"):
        with use_backend(forced), refused("gate_up", forced, f"({forced}: width 12 is not a multiple of 8)"):
            run(p, inputs)


@pytest.mark.parametrize("op", OPS)
def test_hidden_sizes_that_the_hopper_kernels_do_not_gather(anywhere, op):
    """D = 200 is a multiple of 8 and not of 64: Triton makes the products that gather rows so wide."""
    choice = _library.choice(op, *op_arguments(op, Problem(Case(300, 2, 2, 200, 72, block_m=128), dtype=BF16)))
    if op.removesuffix("_") in ("gate_up", "d_activation"):
        reason = "the Hopper kernel gathers rows of a multiple of 64, not 200"
        assert choice.backend == "triton" and choice.passed_over == (("cuda", reason),)
    else:
        assert choice.backend == "cuda"
