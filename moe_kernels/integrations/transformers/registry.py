"""The name in Transformers' registries, and whether a module's config asks for us by it."""

import functools

from torch import nn
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moe_kernels.functional._experts_contract import RECOMPUTE
from moe_kernels.integrations.transformers.experts import (
    ACCUMULATE_GRAD_ATTRIBUTE,
    moe_kernels_experts_forward,
    warn_once,
)


class _Name(str):
    """The name that configs of live models hold. Unpickled in a process that never called ``enable`` (spawn,
    torch.load), it registers itself: Transformers would know no such implementation."""

    def __reduce__(self):
        return restore, ()


def restore() -> "_Name":
    if NAME not in ExpertsInterface._global_mapping:
        register()
    return NAME


NAME = _Name("moe_kernels")
FP8_REASON = "there are no FP8 kernels"


def register(recompute: str | None = None, accumulate_grad: bool = False) -> None:
    check_options(recompute, accumulate_grad)
    forward = functools.partial(moe_kernels_experts_forward, recompute=recompute, accumulate_grad=accumulate_grad)
    ExpertsInterface.register(NAME, forward)
    # FP8 experts look names up in a registry of their own and would raise KeyError on ours.
    FP8ExpertsInterface.register(NAME, _fp8_experts_forward)


def is_registered() -> bool:
    """Is the name bound to our function? Not before the first ``enable`` or ``patch``, and not after ``disable``."""
    function = ExpertsInterface._global_mapping.get(NAME)
    return isinstance(function, functools.partial) and function.func is moe_kernels_experts_forward


def is_switchable(module: nn.Module) -> bool:
    """Is it an experts module whose forward looks up ``experts_implementation``?"""
    # What Transformers' decorator sets in __init__; not hasattr, which adapters' wrappers may forward.
    return {"config", "has_gate", "is_transposed"} <= vars(module).keys()


def check_options(recompute: str | None, accumulate_grad: bool) -> None:
    if recompute not in RECOMPUTE:
        raise ValueError(f'recompute must be None or "pre_activation", got {recompute!r}')
    if not isinstance(accumulate_grad, bool):
        raise TypeError(f"accumulate_grad must be True or False, got {accumulate_grad!r}")


def accumulates_grad(module: nn.Module) -> bool:
    """Is ``accumulate_grad`` on for an experts module that runs on us?"""
    of_all = ExpertsInterface._global_mapping[NAME].keywords["accumulate_grad"]
    return getattr(module, ACCUMULATE_GRAD_ATTRIBUTE, of_all)


def _fp8_experts_forward(self, *args, **kwargs):
    warn_once(type(self).__name__, FP8_REASON)
    return FP8ExpertsInterface._global_mapping["grouped_mm"](self, *args, **kwargs)


def asks_for_us(config) -> bool:
    """Does a module with this config run on us now? ``set_experts_implementation`` and ``disable`` have their say."""
    return config is not None and config._experts_implementation == NAME and is_registered()
