"""The experts function that Transformers calls, and the test of what it can take.

What our ops can't run goes to Transformers' own ``grouped_mm``, with one warning per class and reason. The test runs
at every forward because its facts may change between two (device, dtype, adapters), so it costs a tuple and a lookup.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward
from transformers.utils import logging

from moe_kernels import backends
from moe_kernels.functional import moe_experts
from moe_kernels.functional._autocast import products_dtype
from moe_kernels.ops._contract import FLOATS

logger = logging.get_logger(__name__)

#: Nonlinearity of a class of ``act_fn`` (or of a function in its place).
_NONLINEARITIES: dict[object, str] = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    F.silu: "silu",
    activations.GELUActivation: "gelu",
    nn.GELU: "gelu",
    F.gelu: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
_PLAIN = ("relu2", "gelu", "gelu_tanh", "silu")

#: Name of the attribute with which ``patch(model, recompute=...)`` marks an experts module.
RECOMPUTE_ATTRIBUTE = "_moe_kernels_recompute"


class Facts(NamedTuple):
    """All that decides whether our ops can run a module: hashable, so that the answer is kept."""

    has_gate: bool
    default_gate: bool
    act_fn: object  # its class, or the function itself
    act_approximate: object  # nn.GELU("tanh") has the class of nn.GELU()
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    up_type: type
    up_shape: tuple[int, ...]
    up_dtype: torch.dtype
    down_type: type
    down_shape: tuple[int, ...]
    down_dtype: torch.dtype


class Verdict(NamedTuple):
    activation: str | None
    reason: str | None  # why stock runs it, or None


def moe_kernels_experts_forward(
    self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args, recompute: str | None = None, **kw
) -> Tensor:
    """The experts of one layer: the function behind ``experts_implementation="moe_kernels"``.

    Args:
        self: an experts module of Transformers, or any object with its attributes.
        hidden_states: [T, D].
        top_k_index: [T, K]; ids below 0 or >= the number of experts here mean "no expert".
        top_k_weights: [T, K].
        recompute: for modules that :func:`patch` gave none of their own.

    Returns:
        [T, D] in the dtype of ``hidden_states``.
    """
    up, down = weights(self)  # once: under PEFT each access merges the adapter anew
    activation = _activation_or_warn(
        type(self).__name__,
        facts(self, up, down),
        hidden_states.device,
        products_dtype(up, hidden_states.device.type),
        bool(args or kw),
    )
    if activation is None:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights, *args, **kw)
    x = hidden_states
    if x.dtype != up.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(up.dtype)  # as stock does; under autocast the op itself casts both
    bias_up = bias_down = None
    if getattr(self, "has_bias", False):
        bias_up = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        bias_down = self.down_proj_bias
    out = moe_experts(
        x,
        top_k_weights,
        top_k_index,
        up,
        down,
        activation=activation,
        bias_gate_up_E2I=bias_up,
        bias_down_ED=bias_down,
        recompute=getattr(self, RECOMPUTE_ATTRIBUTE, recompute),
    )
    return out.to(hidden_states.dtype)


def weights(module) -> tuple[Tensor, Tensor]:
    return (module.gate_up_proj if getattr(module, "has_gate", True) else module.up_proj), module.down_proj


def facts(module, up: Tensor, down: Tensor) -> tuple:
    """The fields of :class:`Facts`, as the plain tuple that torch.compile takes for a constant."""
    act_fn, gate = getattr(module, "act_fn", None), getattr(module, "_apply_gate", None)
    return (
        getattr(module, "has_gate", True),
        getattr(gate, "__func__", gate) is _default_apply_gate,
        type(act_fn) if isinstance(act_fn, nn.Module) else act_fn,
        getattr(act_fn, "approximate", None),
        getattr(module, "is_transposed", False),
        getattr(module, "is_concatenated", True),
        getattr(module, "has_post_expert_norm", False),
        type(up),
        tuple(up.shape),
        up.dtype,
        type(down),
        tuple(down.shape),
        down.dtype,
    )


@functools.lru_cache(maxsize=1024)
def judge(seen: tuple) -> Verdict:
    """Can our ops compute the function of a module with these ``facts``? Nothing here depends on the device."""
    f = Facts(*seen)
    activation = _activation(f)
    rows = f.down_shape[-1] * (2 if f.has_gate else 1)
    if f.has_post_expert_norm:
        reason = "a norm follows each expert's output (has_post_expert_norm)"
    elif f.is_transposed:
        reason = "the weights are stored [in, out] (is_transposed)"
    elif f.has_gate and not f.is_concatenated:
        reason = "gate and up rows are interleaved (is_concatenated=False)"
    elif f.has_gate and not f.default_gate:
        reason = "the class has a gate of its own (_apply_gate)"
    elif activation is None:
        reason = f"no kernel for the {'gated ' if f.has_gate else ''}activation {_name(f.act_fn)}"
    elif special := next((t for t in (f.up_type, f.down_type) if hasattr(t, "__tensor_flatten__")), None):
        reason = f"the weights are {special.__name__}s, not plain tensors"
    elif unknown := next((t for t in (f.up_dtype, f.down_dtype) if t not in FLOATS), None):
        reason = f"the weights are quantised or not floating-point ({_name(unknown)})"
    elif f.up_dtype != f.down_dtype:
        reason = f"the two weights differ in dtype ({_name(f.up_dtype)}, {_name(f.down_dtype)})"
    elif len(f.down_shape) != 3 or f.up_shape != (f.down_shape[0], rows, f.down_shape[1]):
        reason = f"weights of an unknown layout ({list(f.up_shape)}, {list(f.down_shape)})"
    else:
        return Verdict(activation, None)
    return Verdict(None, reason)


def _activation(f: Facts) -> str | None:
    """The name our ops have for the activation; None for one they lack."""
    bases = f.act_fn.__mro__ if isinstance(f.act_fn, type) else (f.act_fn,)
    known = next((base for base in bases if base in _NONLINEARITIES), None)
    if known is None or (isinstance(known, type) and f.act_fn.forward is not known.forward):
        return None  # a subclass with arithmetic of its own is another activation
    nonlinearity = _NONLINEARITIES[known]
    if known is nn.GELU and f.act_approximate == "tanh":
        nonlinearity = "gelu_tanh"
    return _GATED.get(nonlinearity) if f.has_gate else nonlinearity if nonlinearity in _PLAIN else None


def choose_backend(seen: tuple, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """(backend, why stock runs instead or None) for a module that ``judge`` accepts.

    The reference backend is as fast as stock on a CPU and far slower anywhere else, so elsewhere it runs only when
    the user forces it.
    """
    _, hidden, intermediate = Facts(*seen).down_shape
    choice = backends.resolve("gate_up", backends.Problem(device, dtype, (hidden, intermediate)))
    if choice.backend != "reference" or device.type == "cpu" or backends.forced_backend() == "reference":
        return choice.backend, None
    return choice.backend, "; ".join(f"{backend}: {why}" for backend, why in choice.passed_over)


@torch.compiler.assume_constant_result  # torch.compile asks once per graph instead of tracing the search
def _activation_or_warn(class_name, seen: tuple, device, dtype, extra_arguments: bool) -> str | None:
    activation, reason = judge(seen)
    if extra_arguments:
        reason = "it was called with arguments that only stock knows"
    if reason is None:
        _, reason = choose_backend(seen, device, dtype)
    if reason is not None:
        _warn_once(class_name, reason)
        return None
    return activation


@torch.compiler.assume_constant_result
def warn_once(class_name: str, reason: str) -> bool:
    return _warn_once(class_name, reason)


@functools.cache
def _warn_once(class_name: str, reason: str) -> bool:
    class_name = class_name.removeprefix("Parametrized")
    logger.warning(
        f"moe_kernels: {class_name} runs on Transformers' grouped_mm: {reason}. moe_kernels.report(model) lists all."
    )
    return True


def _name(thing: object) -> str:
    return (getattr(thing, "__name__", None) or str(thing)).removeprefix("torch.")
