"""What the reference ops share: the products expert by expert, the activations, and autocast held off."""

import functools
from collections.abc import Callable

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
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


def rows_per_expert(offsets_E1: Tensor) -> list[int]:
    return offsets_E1.diff().tolist()


def product_per_expert(rows: Tensor, w_ECN: Tensor, out: Tensor, counts: list[int]) -> None:
    """out = rows of expert e . W[e], for the first ``sum(counts)`` rows; the others stay unwritten."""
    kept = sum(counts)
    # split and unbind make all the views in one call each: with many small experts slicing costs more than the products
    for a, w, y in zip(rows[:kept].split(counts), w_ECN.unbind(), out[:kept].split(counts)):
        torch.mm(a, w, out=y)


def _relu2(z: Tensor) -> Tensor:
    return F.relu(z).square()


def _relu2_bwd(d: Tensor, z: Tensor) -> Tensor:
    return d * F.relu(z) * 2


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_tanh_bwd(d: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d, z, approximate="tanh")


_silu = F.silu, torch.ops.aten.silu_backward
_gelu = F.gelu, torch.ops.aten.gelu_backward

#: activation -> (is it gated, its nonlinearity, the nonlinearity's gradient). No autograd here: an op runs below it, so
#: under a TorchDispatchMode (selective checkpointing, FLOP counters) nothing would be recorded.
_NONLINEARITIES = {
    "swiglu": (True, *_silu),
    "geglu": (True, *_gelu),
    "geglu_tanh": (True, _gelu_tanh, _gelu_tanh_bwd),
    "relu2": (False, _relu2, _relu2_bwd),
    "gelu": (False, *_gelu),
    "gelu_tanh": (False, _gelu_tanh, _gelu_tanh_bwd),
    "silu": (False, *_silu),
}


def activate(h: Tensor, activation: str) -> Tensor:
    """[rows, N] pre-activation -> [rows, I], in the dtype of h."""
    gated, nonlinearity, _ = _NONLINEARITIES[activation]
    if not gated:
        return nonlinearity(h)
    gate, up = h.chunk(2, dim=-1)
    return nonlinearity(gate) * up


def activate_bwd(d_a: Tensor, h: Tensor, activation: str) -> Tensor:
    """Gradient of ``activate`` in h."""
    gated, nonlinearity, nonlinearity_bwd = _NONLINEARITIES[activation]
    if not gated:
        return nonlinearity_bwd(d_a, h)
    gate, up = h.chunk(2, dim=-1)
    return torch.cat([nonlinearity_bwd(d_a * up, gate), d_a * nonlinearity(gate)], dim=-1)
