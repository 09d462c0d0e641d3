"""What the reference ops share: the products expert by expert, the activations, and autocast held off."""

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 256


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


def parts(rows: int) -> list[slice]:
    """The rows, a few hundred at a time, for an epilogue: its temporaries then stay in the cache and in the allocator's
    hands. With megabytes each it can take twice as long, page faults mostly."""
    return [slice(first, min(first + _PART, rows)) for first in range(0, rows, _PART)]


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


def _where_within(d: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    """The gradient of a clamp of z: torch's rule, the bounds themselves pass."""
    return torch.where((z >= low) & (z <= high), d, 0)


def _clamp_before(gate: Tensor, up: Tensor, alpha: float | None, limit: float, shift: float = 0.0) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate if alpha is None else gate * alpha) * (up + shift)


def _clamp_before_bwd(
    d: Tensor, gate: Tensor, up: Tensor, alpha: float | None, limit: float, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    alpha = 1.0 if alpha is None else alpha
    held_gate, held_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(held_gate * alpha)
    d_gate = d * (held_up + shift) * sigmoid * (1 + held_gate * alpha * (1 - sigmoid))
    d_up = d * held_gate * sigmoid
    return _where_within(d_gate, gate, -math.inf, limit), _where_within(d_up, up, -limit, limit)


def _clamp_after(gate: Tensor, up: Tensor, alpha: None, limit: float) -> Tensor:
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _clamp_after_bwd(d: Tensor, gate: Tensor, up: Tensor, alpha: None, limit: float) -> tuple[Tensor, Tensor]:
    f = F.silu(gate)
    d_f = _where_within(d * up.clamp(-limit, limit), f, -math.inf, limit)
    return torch.ops.aten.silu_backward(d_f, gate), _where_within(d * f.clamp(max=limit), up, -limit, limit)


#: clamped activation -> (gate, up, alpha, limit) -> A, and its gradients in gate and up.
_CLAMPED = {
    "swiglu_oai": (partial(_clamp_before, shift=1.0), partial(_clamp_before_bwd, shift=1.0)),
    "swiglu_clamp_before": (_clamp_before, _clamp_before_bwd),
    "swiglu_clamp_after": (_clamp_after, _clamp_after_bwd),
}


def activate(
    h: Tensor, activation: str, alpha: float | None = None, limit: float | None = None, interleaved: bool = False
) -> Tensor:
    """[rows, N] pre-activation -> [rows, I], in the dtype of h."""
    if activation in _CLAMPED:
        return _CLAMPED[activation][0](*_gate_and_up(h, interleaved), alpha, limit)
    gated, nonlinearity, _ = _NONLINEARITIES[activation]
    if not gated:
        return nonlinearity(h)
    gate, up = _gate_and_up(h, interleaved)
    return nonlinearity(gate).mul_(up)


def activate_bwd_(
    d_h: Tensor,
    d_a: Tensor,
    h: Tensor,
    activation: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> None:
    """The gradient of ``activate`` in h, to ``d_h``, which may be where h comes from."""
    if activation in _CLAMPED:
        d_gate, d_up = _CLAMPED[activation][1](d_a, *_gate_and_up(h, interleaved), alpha, limit)
    else:
        gated, nonlinearity, nonlinearity_bwd = _NONLINEARITIES[activation]
        if not gated:
            d_h.copy_(nonlinearity_bwd(d_a, h))
            return
        gate, up = _gate_and_up(h, interleaved)
        d_gate, d_up = nonlinearity_bwd(d_a * up, gate), nonlinearity(gate).mul_(d_a)
    for to, half in zip(_gate_and_up(d_h, interleaved), (d_gate, d_up)):
        to.copy_(half)


def _gate_and_up(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
