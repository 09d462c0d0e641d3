"""What the reference ops share: expert ranges on the host, the activations, and autocast held off."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and activations are computed in: fp32, or fp64 for fp64 data."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(function: Callable) -> Callable:
    """The op's dtypes are the contract: an autocast region around it must not change its products."""

    @functools.wraps(function)
    def run(first: Tensor, *args):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


def expert_ranges(offsets_E1: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, past-the-last row) of every expert that has rows."""
    bounds = offsets_E1.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            yield expert, start, end


def _relu2(z: Tensor) -> Tensor:
    return F.relu(z).square()


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


#: activation -> (is it gated, its nonlinearity)
_NONLINEARITIES = {
    "swiglu": (True, F.silu),
    "geglu": (True, F.gelu),
    "geglu_tanh": (True, _gelu_tanh),
    "relu2": (False, _relu2),
    "gelu": (False, F.gelu),
    "gelu_tanh": (False, _gelu_tanh),
    "silu": (False, F.silu),
}


def activate(h: Tensor, activation: str) -> Tensor:
    """[rows, N] pre-activation -> [rows, I], in the dtype of h."""
    gated, nonlinearity = _NONLINEARITIES[activation]
    if not gated:
        return nonlinearity(h)
    gate, up = h.chunk(2, dim=-1)
    return nonlinearity(gate) * up


def activate_bwd(d_a: Tensor, h: Tensor, activation: str) -> Tensor:
    """Gradient of ``activate`` in h, by autograd: nothing here to get wrong."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        (d_h,) = torch.autograd.grad(activate(h, activation), h, d_a)
    return d_h
