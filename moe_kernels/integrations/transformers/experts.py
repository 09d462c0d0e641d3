"""The experts function that Transformers calls, and the test of what it can take.

What our ops can't run goes to Transformers' own ``grouped_mm``, with one warning per class and reason. The test runs
at every forward because its facts may change between two (device, dtype, adapters), so it costs a tuple and a lookup.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward
from transformers.utils import logging

from moe_kernels import backends
from moe_kernels.functional import RoutingPlan, moe_experts
from moe_kernels.functional._autocast import cast, products_dtype
from moe_kernels.integrations.transformers.fingerprint import fingerprint
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


class Gate(NamedTuple):
    """What an ``_apply_gate`` of a class's own computes, and the attributes that hold its numbers."""

    activation: str
    limit: str | None = None  # None: it is the default gate, in fp32 as our ops are anyway
    alpha: str | None = None
    interleaved: bool = False
    calls_act_fn: bool = False  # where it is SiLU this is the activation; otherwise silu is in the source


#: By the fingerprint of the gate's source; the classes are those of 5.17 and 5.23 that have it.
_GATES = {
    "052fa87ea368": Gate("swiglu_oai", "limit", "alpha", interleaved=True),  # GptOss
    "121fe3bf8e8a": Gate("swiglu_oai", "limit", "alpha"),  # OpenAIPrivacyFilter
    "4d2a5611ab95": Gate("swiglu_oai", "swiglu_limit", "swiglu_alpha"),  # MiniMaxM3VL
    "c9a41a040677": Gate("swiglu_clamp_before", "limit", calls_act_fn=True),  # DeepseekV4
    "f0c950163b46": Gate("swiglu_clamp_before", "swiglu_limit"),  # Glm5NextText, HYV4
    "56b2bb71f5bc": Gate("swiglu", calls_act_fn=True),  # Beam, of 5.23
    "9becca301256": Gate("swiglu_clamp_after", "limit", calls_act_fn=True),  # Step3p7, not decorated
}
_UNKNOWN = "unknown"  # in the place of a fingerprint
#: Attributes that the gates above read, in the order of ``Facts.numbers``.
_NUMBERS = ("alpha", "limit", "swiglu_alpha", "swiglu_limit")

#: Names of the attributes with which ``patch(model, recompute=..., accumulate_grad=...)`` marks an experts module.
RECOMPUTE_ATTRIBUTE = "_moe_kernels_recompute"
ACCUMULATE_GRAD_ATTRIBUTE = "_moe_kernels_accumulate_grad"
_PLAN_ATTRIBUTE = "_moe_kernels_plan"  # of a tensor of indices


class Facts(NamedTuple):
    """All that decides whether our ops can run a module: hashable, so that the answer is kept."""

    has_gate: bool
    gate: str | None  # the fingerprint of one of the class's own, None for Transformers' default
    numbers: tuple  # of a gate that isn't the default: the attributes _NUMBERS
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


class Activation(NamedTuple):
    """Arguments of ``moe_experts`` by name."""

    activation: str
    alpha: float | None = None
    limit: float | None = None
    interleaved: bool = False


class Verdict(NamedTuple):
    activation: Activation | None
    reason: str | None  # why stock runs it, or None


def moe_kernels_experts_forward(
    self,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *args,
    recompute: str | None = None,
    accumulate_grad: bool = False,
    residual_TD: Tensor | None = None,
    **kw,
) -> Tensor:
    """The experts of one layer: the function behind ``experts_implementation="moe_kernels"``.

    Args:
        self: an experts module of Transformers, or any object with its attributes.
        hidden_states: [T, D].
        top_k_index: [T, K]; ids below 0 or >= the number of experts here mean "no expert".
        top_k_weights: [T, K].
        recompute, accumulate_grad: for modules that :func:`patch` gave none of their own.
        residual_TD: [T, D], added to the result: our blocks pass their shared expert's output.

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
        out = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights, *args, **kw)
        return out if residual_TD is None else out + residual_TD
    x = hidden_states
    if x.dtype != up.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(up.dtype)  # as stock does; under autocast the op itself casts both
    bias_up = bias_down = None
    if getattr(self, "has_bias", False):
        bias_up = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        bias_down = self.down_proj_bias
    if getattr(self, "is_transposed", False):
        up, down = up.mT, down.mT
    joins = residual_TD is not None and residual_TD.dtype == products_dtype(x, x.device.type)
    name, alpha, limit, interleaved = activation
    out = moe_experts(
        x,
        top_k_weights,
        _plan_of(top_k_index, up.shape[0]),
        up,
        down,
        activation=name,
        alpha=alpha,
        limit=limit,
        interleaved=interleaved,
        bias_gate_up_E2I=bias_up,
        bias_down_ED=bias_down,
        residual_TD=residual_TD if joins else None,
        recompute=_attribute(self, RECOMPUTE_ATTRIBUTE, recompute),
        accumulate_grad=_attribute(self, ACCUMULATE_GRAD_ATTRIBUTE, accumulate_grad),
    )
    out = cast(out, hidden_states.dtype)
    return out if joins or residual_TD is None else out + residual_TD


def hand_on(plan: RoutingPlan, indices_TK: Tensor) -> None:
    """Let the experts that get this very tensor use the plan of it."""
    if not torch.compiler.is_compiling():
        setattr(indices_TK, _PLAN_ATTRIBUTE, (plan, indices_TK._version))


def _plan_of(indices_TK: Tensor, num_experts: int) -> RoutingPlan | Tensor:
    """The plan that was handed on; the indices where none was, or where it is of other indices or experts."""
    if torch.compiler.is_compiling() or not hasattr(indices_TK, _PLAN_ATTRIBUTE):
        return indices_TK
    plan, version = getattr(indices_TK, _PLAN_ATTRIBUTE)
    return plan if version == indices_TK._version and num_experts == plan.num_experts else indices_TK


def weights(module) -> tuple[Tensor, Tensor]:
    return (module.gate_up_proj if getattr(module, "has_gate", True) else module.up_proj), module.down_proj


def facts(module, up: Tensor, down: Tensor) -> tuple:
    """The fields of :class:`Facts`, as the plain tuple that torch.compile takes for a constant."""
    act_fn, gate = getattr(module, "act_fn", None), getattr(module, "_apply_gate", None)
    gate, own_gate, numbers = getattr(gate, "__func__", gate), None, ()
    if gate is not _default_apply_gate:
        own_gate = _gate_of_class(type(module)) if gate is getattr(type(module), "_apply_gate", None) else _UNKNOWN
        numbers = tuple(getattr(module, name, None) for name in _NUMBERS)
    return (
        getattr(module, "has_gate", True),
        own_gate,
        numbers,
        type(act_fn) if isinstance(act_fn, nn.Module) else act_fn,
        act_fn.approximate if isinstance(act_fn, nn.GELU) else None,
        getattr(module, "is_transposed", False),
        getattr(module, "is_concatenated", True),
        _attribute(module, "has_post_expert_norm", False),
        type(up),
        tuple(up.shape),
        up.dtype,
        type(down),
        tuple(down.shape),
        down.dtype,
    )


def _attribute(module, name: str, default):
    """``getattr`` for what most modules lack and is no tensor or module: by nn.Module a miss costs an exception."""
    return module.__dict__.get(name, getattr(type(module), name, default))


@torch.compiler.assume_constant_result
def _gate_of_class(cls: type) -> str:
    return fingerprint(cls, "_apply_gate") or _UNKNOWN


@functools.lru_cache(maxsize=1024)
def judge(seen: tuple) -> Verdict:
    """Can our ops compute the function of a module with these ``facts``? Nothing here depends on the device."""
    f = Facts(*seen)
    activation, reason = _activation(f)
    up_shape, down_shape = _untransposed(f)
    rows = down_shape[-1] * (2 if f.has_gate else 1)
    if f.has_post_expert_norm:
        reason = "a norm follows each expert's output (has_post_expert_norm)"
    elif reason is not None:
        pass
    elif special := next((t for t in (f.up_type, f.down_type) if hasattr(t, "__tensor_flatten__")), None):
        reason = f"the weights are {special.__name__}s, not plain tensors"
    elif unknown := next((t for t in (f.up_dtype, f.down_dtype) if t not in FLOATS), None):
        reason = f"the weights are quantised or not floating-point ({_name(unknown)})"
    elif f.up_dtype != f.down_dtype:
        reason = f"the two weights differ in dtype ({_name(f.up_dtype)}, {_name(f.down_dtype)})"
    elif len(down_shape) != 3 or up_shape != (down_shape[0], rows, down_shape[1]):
        reason = f"weights of an unknown layout ({list(f.up_shape)}, {list(f.down_shape)})"
    else:
        return Verdict(activation, None)
    return Verdict(None, reason)


def _untransposed(f: Facts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of both weights as [E, out, in]."""
    shapes = f.up_shape, f.down_shape
    return tuple((s[0], s[2], s[1]) if f.is_transposed and len(s) == 3 else s for s in shapes)


def _activation(f: Facts) -> tuple[Activation | None, str | None]:
    """What our ops have for the activation, or the reason why they have nothing."""
    if not f.has_gate:
        known = _nonlinearity(f)
        return (Activation(known), None) if known in _PLAIN else (None, f"no kernel for the {_of(f)}")
    gate = None
    if f.gate is not None:
        gate = _GATES.get(f.gate)
        if gate is None:
            return None, "the class has a gate of its own (_apply_gate), which is unknown"
    if f.is_concatenated == (gate is not None and gate.interleaved):
        return None, f"its gate and is_concatenated={f.is_concatenated} tell two stories"
    known = "silu" if gate is not None and not gate.calls_act_fn else _nonlinearity(f)
    if gate is None or gate.limit is None:
        return (Activation(_GATED[known]), None) if known in _GATED else (None, f"no kernel for the {_of(f)}")
    if known != "silu":
        return None, f"no kernel for the clamped {_of(f)}"
    alpha, limit = (dict(zip(_NUMBERS, f.numbers)).get(name) for name in (gate.alpha, gate.limit))
    if limit == math.inf and gate.alpha is None:
        return Activation("swiglu", interleaved=gate.interleaved), None
    for name, value in ((gate.alpha, alpha), (gate.limit, limit)):
        if name is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            return None, f"no kernel for a gate whose {name} is {value!r}"
    return Activation(gate.activation, alpha, limit, gate.interleaved), None


def _of(f: Facts) -> str:
    return f"{'gated ' if f.has_gate else ''}activation {_name(f.act_fn)}"


def _nonlinearity(f: Facts) -> str | None:
    """The name our ops have for ``act_fn``; None for one they lack."""
    bases = f.act_fn.__mro__ if isinstance(f.act_fn, type) else (f.act_fn,)
    known = next((base for base in bases if base in _NONLINEARITIES), None)
    if known is None or (isinstance(known, type) and f.act_fn.forward is not known.forward):
        return None  # a subclass with arithmetic of its own is another activation
    if known is nn.GELU and f.act_approximate == "tanh":
        return "gelu_tanh"
    return _NONLINEARITIES[known]


def choose_backend(seen: tuple, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """(backend, why stock runs instead or None) for a module that ``judge`` accepts.

    The reference backend is as fast as stock on a CPU and far slower anywhere else, so elsewhere it runs only when
    the user forces it.
    """
    choice = backends.resolve("gate_up", _problem(seen, device, dtype))
    if choice.backend != "reference" or device.type == "cpu" or backends.forced_backend() == "reference":
        return choice.backend, None
    return choice.backend, "; ".join(f"{backend}: {why}" for backend, why in choice.passed_over)


@functools.lru_cache(maxsize=1024)
def _problem(seen: tuple, device: torch.device, dtype: torch.dtype) -> backends.Problem:
    f = Facts(*seen)
    _, (_, hidden, intermediate) = _untransposed(f)
    activation, _ = judge(seen)
    asked = {
        f"activation {activation.activation}": activation.activation != "swiglu",
        "interleaved gate_up": activation.interleaved,
        "transposed weights": f.is_transposed,
    }
    traits = tuple(name for name, is_asked in asked.items() if is_asked)
    return backends.Problem(device, dtype, (hidden, intermediate), traits=traits)


@torch.compiler.assume_constant_result  # torch.compile asks once per graph instead of tracing the search
def _activation_or_warn(class_name, seen: tuple, device, dtype, extra_arguments: bool) -> tuple | None:
    activation, reason = judge(seen)
    if extra_arguments:
        reason = "it was called with arguments that only stock knows"
    if reason is None:
        _, reason = choose_backend(seen, device, dtype)
    if reason is not None:
        _warn_once(class_name, reason)
        return None
    return tuple(activation)


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
