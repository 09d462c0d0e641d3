"""fp32 logits of half-precision tokens: as exact as the product of upcast operands, and so are the gradients."""

import pytest
import torch

from moe_kernels.functional._router_logits import router_logits
from tests.helpers import relative_l2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
T, D, E = 257, 96, 24


def problem(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w, d = (torch.randn(*shape, generator=generator).to(device) for shape in ((T, D), (E, D), (T, E)))
    return x.to(dtype).requires_grad_(), (w * D**-0.5).to(dtype).requires_grad_(), d


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_gradients(device, dtype, autocast):
    x, w, d = problem(device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        logits = router_logits(x, w)
        logits.backward(d)
    assert logits.dtype == torch.float32 and relative_l2(logits, x.double() @ w.double().T) < 1e-6
    for leaf, truth in ((x, d.double() @ w.double()), (w, d.double().T @ x.double())):
        assert leaf.grad.dtype == dtype
        rounded = relative_l2(truth.to(dtype), truth)  # what no result in this dtype can be better than
        assert relative_l2(leaf.grad, truth) <= 1.01 * rounded + 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_router_gets_no_gradient(device):
    x, w, d = problem(device, torch.bfloat16)
    router_logits(x, w.requires_grad_(False)).backward(d)
    assert x.grad is not None and w.grad is None
    x, w, d = problem(device, torch.bfloat16)
    router_logits(x.detach(), w).backward(d)
    assert w.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_compile(device, dtype):
    x, w, d = problem(device, dtype)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(router_logits, fullgraph=True, backend=backend)(x, w)
    assert relative_l2(compiled, router_logits(x, w)) < 1e-6
    compiled.backward(d)
    assert relative_l2(w.grad, d.double().T @ x.double()) < 5e-3


def test_double_backward_is_refused():
    x, w, _ = problem("cpu", torch.bfloat16)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(router_logits(x, w).square().sum(), x, create_graph=True)
