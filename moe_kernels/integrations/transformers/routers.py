"""The routers of Transformers as data, and the forward that runs any of them through one ``topk_route``.

A rule says what the forward with that fingerprint computes; sizes and factors are read from the module at each call.
The adapter returns the stock tuple: the same order, dtypes and router logits, so that output recorders and auxiliary
losses see what they know. Indices come best first, which stock does not promise either way.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from moe_kernels import backends, ops
from moe_kernels.functional import topk_route
from moe_kernels.functional._router_logits import router_logits
from moe_kernels.integrations.transformers.fingerprint import fingerprint
from moe_kernels.integrations.transformers.registry import asks_for_us

#: Name of the attribute that ties a router to the config of its experts, which says who runs.
CONFIG_ATTRIBUTE = "_moe_kernels_config"


class Of(NamedTuple):
    """A value that the module holds: the name of its attribute."""

    attribute: str


class RouterRule(NamedTuple):
    name: str  # of the family that had it first
    logits: str  # how they are made, a key of LOGITS
    scoring: str | Of = "softmax"  # or a module that computes one of SCORINGS
    score_after_topk: bool = False
    bias: str | None = None  # added for choosing only: an attribute, or ARGUMENT of the forward
    renormalize: bool | Of = False
    epsilon: float | Of = 0.0
    min_sum: float | Of = 0.0
    scale: float | Of = 1.0
    mean: bool = False  # the weights are divided by top_k, which the block multiplies by later
    groups: bool | Of = False  # num_group and topk_group of the module; Of: where this is "group_limited_greedy"
    group_score: str = "top2_sum"
    losers_zero: bool = False
    round_scores: bool = False  # the arithmetic is that of the logits' dtype
    weights_like: str | None = None  # the dtype of the weights: that of "logits", of the "input", or None for fp32
    order: tuple[int, int, int] = (0, 1, 2)  # of (logits, weights, indices) in what it returns
    needs: tuple[tuple[str, str], ...] = ()  # fingerprints of children whose forward the rule contains


ARGUMENT = "argument"
INDICES_FIRST = (2, 1, 0)
GROUPED = "group_limited_greedy"
SCORINGS: dict[type, str] = {activations.SqrtSoftplusActivation: "sqrtsoftplus", nn.Sigmoid: "sigmoid"}


def _capped(module: nn.Module, x_TD: Tensor) -> Tensor:
    logits_TE, cap = F.linear(x_TD, module.weight).float(), module.router_logit_softcapping
    return torch.tanh(logits_TE / cap) * cap if cap > 0 else logits_TE


def _of_wg(module: nn.Module, x_TD: Tensor) -> Tensor:
    return module.wg(x_TD.float() if module.wg.weight.dtype == torch.float32 else x_TD)


#: (module, x [T, D]) -> logits [T, E] in the dtype that stock returns them in
LOGITS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "fp32 of both upcast": lambda module, x_TD: router_logits(x_TD, module.weight),
    "fp32 of both upcast, multiplied": lambda module, x_TD: (
        router_logits(x_TD, module.weight) * module.output_multiplier
    ),
    "fp32 of all upcast": lambda module, x_TD: router_logits(x_TD, module.weight) + module.bias.float(),
    "model dtype": lambda module, x_TD: F.linear(x_TD, module.weight),
    "weight dtype": lambda module, x_TD: F.linear(x_TD.to(module.weight.dtype), module.weight),
    "model dtype, with bias": lambda module, x_TD: F.linear(x_TD, module.weight, module.bias),
    "model dtype, then fp32": lambda module, x_TD: F.linear(x_TD, module.weight).float(),
    "model dtype, then fp32, capped": _capped,
    "of its child gate, then fp32": lambda module, x_TD: module.gate(x_TD).float(),
    "of its child wg": _of_wg,
}

_DEEPSEEK_V3 = RouterRule(
    "DeepSeek-V3",
    "fp32 of both upcast",
    "sigmoid",
    bias="e_score_correction_bias",
    renormalize=Of("norm_topk_prob"),
    epsilon=1e-20,
    scale=Of("routed_scaling_factor"),
    groups=True,
)
_QWEN3 = RouterRule("Qwen3", "model dtype", renormalize=Of("norm_topk_prob"), weights_like="logits")
_MINIMAX_M2 = RouterRule("MiniMax-M2", "weight dtype", "sigmoid", bias=ARGUMENT, renormalize=True)
_GPT_OSS = RouterRule("gpt-oss", "model dtype, with bias", score_after_topk=True, weights_like="logits")
_GRANITE = RouterRule("Granite", "model dtype, then fp32", score_after_topk=True, weights_like="input")
_ERNIE = RouterRule(
    "Ernie 4.5",
    "fp32 of both upcast",
    bias="moe_statics.e_score_correction_bias",
    renormalize=True,
    min_sum=Of("norm_min"),
    weights_like="input",
    needs=(("moe_statics", "7ff768a8bf31"),),
)
_MISTRAL4 = RouterRule(
    "Mistral 4",
    "model dtype",
    renormalize=Of("norm_topk_prob"),
    epsilon=1e-20,
    scale=Of("routed_scaling_factor"),
    groups=True,
    round_scores=True,
    weights_like="logits",
)

#: fingerprint of the forward -> what it computes
ROUTERS: dict[str, RouterRule] = {
    "4f00c59f235d": _DEEPSEEK_V3,
    "657ee81564bd": _DEEPSEEK_V3._replace(name="Beam", scale=1.0),
    "5cf97fe93eec": _DEEPSEEK_V3._replace(name="A.X K2", losers_zero=True),
    "3d173234cc47": _DEEPSEEK_V3._replace(
        name="Hunyuan V3", bias=ARGUMENT, renormalize=True, scale=Of("router_scaling_factor"), groups=False
    ),
    "fb60f1c6606b": _QWEN3,
    "2c78db657b5a": _QWEN3._replace(name="Qwen3.5", renormalize=True),
    "5f56cf0f4682": _QWEN3._replace(name="Jamba", renormalize=False, weights_like="input"),
    "d07e7a9b5307": _QWEN3._replace(name="Mixtral", renormalize=True, weights_like=None),
    "587b6ef300a2": _QWEN3._replace(name="Hunyuan V1", logits="of its child wg", renormalize=True),
    "9f4990531df0": _MINIMAX_M2,
    "afa1a542e689": _MINIMAX_M2._replace(name="MiniMax-M3", bias="e_score_correction_bias"),
    "8c7f8072c723": _MINIMAX_M2._replace(
        name="Flint", logits="fp32 of both upcast", bias=None, renormalize=Of("norm_topk_prob")
    ),
    "a7b2c6f8d67d": RouterRule(
        "DeepSeek-V2",
        "fp32 of both upcast",
        scale=Of("routed_scaling_factor"),
        groups=Of("topk_method"),
        group_score="max",
    ),
    "f37e80a6c010": _MISTRAL4,
    "5f09ccb4799c": _MISTRAL4._replace(
        name="Mistral Large 4",
        logits="fp32 of both upcast",
        renormalize=True,
        round_scores=False,
        weights_like=None,
    ),
    "dcecba50a93e": _ERNIE,
    "d8a888143d9f": _ERNIE,
    "92d9fba8efe7": _GPT_OSS,
    "a142191a9776": _GPT_OSS._replace(name="Aria", logits="model dtype"),
    "a985ca8c8a14": _GPT_OSS._replace(
        name="OpenAI privacy filter", logits="fp32 of all upcast", mean=True, weights_like=None
    ),
    "cba4a62d43d7": _GRANITE._replace(order=INDICES_FIRST),
    "03de86e6a899": _GRANITE,
    "5e2629047507": RouterRule(
        "Cohere 2",
        "model dtype",
        Of("expert_selection_fn"),
        score_after_topk=True,
        renormalize=Of("norm_topk_prob"),
        weights_like="input",
    ),
    "44b2cf73a9d0": RouterRule(
        "Kolibri",
        "fp32 of both upcast",
        "sigmoid",
        score_after_topk=True,
        bias="e_score_correction_bias",
        renormalize=Of("norm_topk_prob"),
    ),
    "5837e6c20a22": RouterRule(
        "Trinity (afmoe)",
        "of its child gate, then fp32",
        "sigmoid",
        bias=ARGUMENT,
        renormalize=True,
        epsilon=1e-20,
        scale=Of("route_scale"),
    ),
    "ac66efd6daa7": RouterRule(
        "DeepSeek-V4",
        "model dtype",
        Of("score_fn"),
        bias="e_score_correction_bias",
        renormalize=True,
        epsilon=1e-20,
        scale=Of("routed_scaling_factor"),
        round_scores=True,
        weights_like="logits",
    ),
    "8297f5e84d15": RouterRule(
        "Inkling 2",
        "fp32 of both upcast",
        Of("score_fn"),
        bias="e_score_correction_bias",
        renormalize=True,
        epsilon=1e-20,
        scale=Of("routed_scaling_factor"),
    ),
    "1818d73d983e": RouterRule(
        "Muse Spark",
        "fp32 of both upcast, multiplied",
        Of("scoring_function"),
        bias="e_score_correction_bias",
        renormalize=True,
        epsilon=Of("norm_topk_prob_eps"),
        scale=Of("routed_scaling_factor"),
    ),
    "a4f4ee236570": RouterRule(
        "Laguna",
        "model dtype, then fp32, capped",
        "sigmoid",
        bias="e_score_correction_bias",
        renormalize=True,
        weights_like="input",
    ),
    "592562a1a302": RouterRule(
        "LFM2",
        "model dtype",
        "sigmoid",
        bias=ARGUMENT,
        renormalize=Of("norm_topk_prob"),
        epsilon=1e-6,
        scale=Of("routed_scaling_factor"),
        round_scores=True,
        weights_like="logits",
    ),
}

#: fingerprint -> why stock keeps a router that we know
STAYS_STOCK: dict[str, str] = {
    "bd756497c777": "it samples experts at random in training (sparsemixer)",
    "d980b9c0a278": "it carries a state from layer to layer",
    "0133009f232c": "it looks experts up by token id and chooses none",
    "4e56887f8b06": "it has a norm and scales of its own",
    "b2b9605ef845": "its weights scale the shared experts too",
    "3f23c973a4ca": "its weights scale the shared experts too",
}


def why_not(module: nn.Module, rule: RouterRule) -> str | None:
    """Why this module can't run by the rule of its class: a property that no forward changes."""
    for name, digits in rule.needs:
        if fingerprint(type(getattr(module, name))) != digits:
            return f"no rule for the source of its {name}"
    if (scoring := _scoring(module, rule)) not in ops.topk_route.SCORINGS:
        return f"there is no scoring {scoring!r}"
    if isinstance(rule.groups, Of) and _value(module, rule.groups) not in ("greedy", GROUPED):
        return f"{rule.groups.attribute} is {_value(module, rule.groups)!r}"
    groups, kept = _groups(module, rule)
    if groups > 1:
        experts = module.weight.shape[0]
        least = 1 if rule.group_score == "max" else 2
        if experts % groups or experts < least * groups or kept > groups or module.top_k > experts // groups * kept:
            return f"{module.top_k} of {experts} experts in {kept} of {groups} groups"
    return None


def adapter(rule: RouterRule, stock_forward: Callable) -> Callable:
    """The forward of a router that runs by ``rule``, and by ``stock_forward`` where it must not."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not asks_for_us(getattr(self, CONFIG_ATTRIBUTE, None)) or _is_distributed(hidden_states, self):
            return stock_forward(self, hidden_states, *args, **kwargs)
        if not runs_here(hidden_states.device, hidden_states.dtype):
            return stock_forward(self, hidden_states, *args, **kwargs)
        bias = next(iter((*args, *kwargs.values())), None) if rule.bias == ARGUMENT else None
        return route(rule, self, hidden_states, bias)

    return forward


def route(rule: RouterRule, module: nn.Module, hidden_states: Tensor, argument: Tensor | None) -> tuple[Tensor, ...]:
    """What stock returns: (logits, weights, indices) in the order of the rule."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE = LOGITS[rule.logits](module, x_TD)
    groups, kept = _groups(module, rule)
    weights_TK, indices_TK = topk_route(
        logits_TE,
        module.top_k,
        scoring=_scoring(module, rule),
        score_after_topk=rule.score_after_topk,
        renormalize=bool(_value(module, rule.renormalize)),
        epsilon=float(_value(module, rule.epsilon)),
        scale=1.0 / module.top_k if rule.mean else float(_value(module, rule.scale)),
        selection_bias_E=argument if rule.bias == ARGUMENT else _bias(module, rule),
        num_groups=groups,
        top_groups=kept,
        group_score=rule.group_score,
        losers_zero=rule.losers_zero,
        min_sum=float(_value(module, rule.min_sum)),
        round_scores=rule.round_scores,
        weights_dtype=_weights_dtype(rule, logits_TE, hidden_states),
    )
    result = logits_TE, weights_TK, indices_TK
    return tuple(result[i] for i in rule.order)


def choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """(backend, why stock runs instead or None): as for the experts, only a CPU runs the reference unasked."""
    choice = backends.resolve("topk_route", backends.Problem(device, dtype, ()))
    if choice.backend != "reference" or device.type == "cpu" or backends.forced_backend() == "reference":
        return choice.backend, None
    return choice.backend, "; ".join(f"{backend}: {why}" for backend, why in choice.passed_over)


@torch.compiler.assume_constant_result  # torch.compile asks once per graph
def runs_here(device: torch.device, dtype: torch.dtype) -> bool:
    return choose_backend(device, dtype)[1] is None


def _is_distributed(hidden_states: Tensor, module: nn.Module) -> bool:
    """DTensors, which our ops know nothing of."""
    return hasattr(hidden_states, "to_local") or hasattr(getattr(module, "weight", None), "to_local")


def _value(module: nn.Module, value):
    return getattr(module, value.attribute) if isinstance(value, Of) else value


def _scoring(module: nn.Module, rule: RouterRule) -> str:
    scoring = _value(module, rule.scoring)
    return SCORINGS.get(type(scoring), type(scoring).__name__) if isinstance(scoring, nn.Module) else scoring


def _groups(module: nn.Module, rule: RouterRule) -> tuple[int, int]:
    """(num_groups, top_groups)"""
    has_groups = _value(module, rule.groups) == GROUPED if isinstance(rule.groups, Of) else rule.groups
    return (module.num_group, module.topk_group) if has_groups and module.num_group is not None else (1, 1)


def _bias(module: nn.Module, rule: RouterRule) -> Tensor | None:
    if rule.bias is None:
        return None
    for name in rule.bias.split("."):
        module = getattr(module, name)
    return module.flatten()


def _weights_dtype(rule: RouterRule, logits_TE: Tensor, hidden_states: Tensor) -> torch.dtype:
    if rule.weights_like is None:
        return torch.promote_types(logits_TE.dtype, torch.float32)
    return logits_TE.dtype if rule.weights_like == "logits" else hidden_states.dtype
