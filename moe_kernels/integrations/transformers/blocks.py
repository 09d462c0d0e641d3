"""Whole MoE blocks: the shared expert's output joins the sum over the experts, instead of an addition after it.

Where a projection stands between the experts and that addition (Nemotron-3 Super, Ultra), it joins the projection's.
The router and the shared expert still run as modules, so that hooks, recorders, adapters and quantised layers of
theirs are none of our business. Only the experts get one more argument, and only when nothing stands between the
block and our function; otherwise the block's stock forward runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Experts

from moe_kernels.functional._autocast import products_dtype
from moe_kernels.integrations.transformers.registry import FP8_REASON, asks_for_us


class BlockRule(NamedTuple):
    name: str  # of the family
    shared: str = "shared_experts"  # the module every token passes through
    shared_gate: str | None = None  # a projection to one number, whose sigmoid scales the shared output
    router: str = "gate"
    router_argument: str | None = None  # an attribute that the router takes beside the tokens
    flat: tuple[str, ...] = ()  # which of "router" and "shared" get [T, D] instead of [B, S, D]
    latent: tuple[str, str] | None = None  # projections before and after the experts
    scale: str | None = None  # an attribute by which the block multiplies the experts' output
    after: str | None = None  # a module that the sum goes through
    only_if: tuple[str, object] | None = None  # (attribute, value): the case that the rule describes


_FLAT = ("router", "shared")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = (nn.Parameter, Tensor)  # not a DTensor, nor a quantised weight

#: fingerprint of the forward -> what it computes
BLOCKS: dict[str, BlockRule] = {
    "7cc7bb414bf0": BlockRule("DeepSeek and GLM"),
    "6b502937aba2": BlockRule("Qwen", "shared_expert", "shared_expert_gate", flat=_FLAT),
    "64b4a2d7a322": BlockRule("Nemotron-H", latent=("fc1_latent_proj", "fc2_latent_proj")),
    "5f79cd7f3847": BlockRule("Flint", "shared_expert", flat=_FLAT),
    "45a3acc7ef9a": BlockRule("Laguna and MiniMax-M3", flat=_FLAT, scale="routed_scaling_factor"),
    "aa79653268f3": BlockRule("A.X K1", after="post_mlp_layernorm"),
    "d1f7b9461e1b": BlockRule("Trinity (afmoe)", router="router", router_argument="expert_bias", flat=("shared",)),
    "5fd93c904670": BlockRule("Hunyuan V3", router_argument="e_score_correction_bias", flat=_FLAT),
    "ad8877f1e352": BlockRule("Hunyuan V1", shared="shared_mlp", flat=("router",)),
    "75be86b45a7b": BlockRule("Ernie 4.5", flat=_FLAT),
    "b783c40d2202": BlockRule("Aria", router="router", flat=("router",)),
    "0173013f4f78": BlockRule("Cohere 2", flat=_FLAT, only_if=("shared_expert_combination_strategy", "sum")),
}

#: Blocks of a router and experts alone: their stock forward calls our router and our experts, and that is all.
NOTHING_TO_FUSE = frozenset(
    {
        "b083c9efb86f",  # Qwen3
        "793fe49b5ceb",  # OLMoE
        "1a7689838a6d",  # Mixtral
        "80f773f4a0b7",  # MiniMax-M2
        "76912c3f8ddf",  # gpt-oss
        "718cdef29f97",  # Granite
        "50259af5d15a",  # Granite, newer
        "89c610367ffe",  # Jamba
        "53d537df6157",  # Jamba, newer
        "cc4afb203b8b",  # LFM2
        "aa17be9f7f94",  # MiMo-V2
        "e1b585e54dc3",  # Phi
        "8895d4aa50df",  # Zaya
        "1c464b45e7b8",  # Ernie VL, one of its two
        "8806360e2afd",  # Beam
        "0956841d861a",  # Dots3 Note, vision
        "c489fa92a934",  # Muse Spark
    }
)
#: fingerprint -> why stock keeps a block that we know
STAYS_STOCK: dict[str, str] = {
    "7679806a2a3f": "its router may take token ids (DeepSeek-V4)",
    "4be11f32ba89": "its router weighs the shared experts too (Inkling)",
    "ca87a9bbdc31": "it multiplies the experts' sum by top_k (OpenAI privacy filter)",
}


def why_not(module: nn.Module, rule: BlockRule) -> str | None:
    """Why this module can't run by the rule of its class: a property that no forward changes."""
    if getattr(module, rule.shared, None) is None:
        return "there is no shared expert in it"
    if rule.only_if is not None and getattr(module, rule.only_if[0]) != rule.only_if[1]:
        return f"{rule.only_if[0]} is {getattr(module, rule.only_if[0])!r}"
    return None


def why_not_now(module: nn.Module) -> str | None:
    """Why the block's stock forward runs at this call; hooks and adapters come and go."""
    experts = module.experts
    if (wrapper := _wrapper(experts)) is not None:
        return wrapper
    if isinstance(experts, FP8Experts):
        return FP8_REASON
    return None if asks_for_us(experts.config) else "the experts run on another implementation"


def adapter(rule: BlockRule, stock_forward: Callable) -> Callable:
    """The forward of a block that runs by ``rule``, and by ``stock_forward`` where it must not."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if args or kwargs or why_not_now(self) is not None:
            return stock_forward(self, hidden_states, *args, **kwargs)
        return run(rule, self, hidden_states)

    return forward


def run(rule: BlockRule, module: nn.Module, hidden_states: Tensor) -> Tensor:
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    more = () if rule.router_argument is None else (getattr(module, rule.router_argument),)
    _, weights_TK, indices_TK = getattr(module, rule.router)(x_TD if "router" in rule.flat else hidden_states, *more)
    shared = getattr(module, rule.shared)(x_TD if "shared" in rule.flat else hidden_states).reshape(x_TD.shape)
    if rule.shared_gate is not None:
        shared = F.sigmoid(getattr(module, rule.shared_gate)(x_TD)) * shared
    if rule.scale is not None:  # of the sum: the weights are scaled in fp32 instead
        weights_TK = weights_TK.float() * getattr(module, rule.scale)
    before, after = (getattr(module, name) for name in rule.latent) if rule.latent else (None, None)
    if before is None or (_is_plain(before, nn.Identity) and _is_plain(after, nn.Identity)):
        out_TD = module.experts(x_TD, indices_TK, weights_TK, residual_TD=shared)
    else:
        out_TD = _add_projected(shared, module.experts(before(x_TD), indices_TK, weights_TK), after)
    out = out_TD.view(hidden_states.shape)
    return out if rule.after is None else getattr(module, rule.after)(out)


def _add_projected(shared_TD: Tensor, latent_TL: Tensor, projection: nn.Module) -> Tensor:
    """shared + projection(latent), in one product where the projection is that product and nothing else."""
    if _is_plain(projection, nn.Linear) and projection.bias is None:
        weight = projection.weight
        # In one dtype, autocast's where it rules: a sum in another one would be rounded first.
        if type(weight) in _TENSORS and shared_TD.dtype == latent_TL.dtype == products_dtype(
            weight, weight.device.type
        ):
            return torch.addmm(shared_TD, latent_TL, weight.T)
    return shared_TD + projection(latent_TL)


def _is_plain(module: nn.Module, cls: type) -> bool:
    """Is it ``cls`` itself, unadapted, with nothing that sees or changes its calls?"""
    held = module.__dict__  # offloading and tensor parallelism put a forward there
    return type(module) is cls and "forward" not in held and not any(map(held.get, _HOOKS))


def _wrapper(experts: nn.Module) -> str | None:
    """What would see, change or sum what our function returns, or None."""
    held = experts.__dict__
    if "config" not in held or "has_gate" not in held:
        return f"the experts are wrapped in {type(experts).__name__}"
    if "forward" in held or "_hf_hook" in held or held.get("_is_hooked") or held.get("_is_expert_parallel"):
        return "another library runs the experts' forward (tensor or expert parallelism, offloading)"
    return "the experts have hooks" if any(map(held.get, _HOOKS)) else None
