"""Switch Transformers' MoE models to our experts function and back.

The state lives in Transformers: a name in two registries, and one wrapped method that decides the default. Configs
never serialise the name, so checkpoints carry no trace.
"""

import functools

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from moe_kernels.functional._experts_contract import RECOMPUTE
from moe_kernels.integrations.transformers.experts import (
    RECOMPUTE_ATTRIBUTE,
    moe_kernels_experts_forward,
    warn_once,
)


class _Name(str):
    """The name that configs of live models hold. Unpickled in a process that never called :func:`enable` (spawn,
    torch.load), it registers itself: Transformers would know no such implementation."""

    def __reduce__(self):
        return _restore, ()


def _restore() -> "_Name":
    if NAME not in ExpertsInterface._global_mapping:
        _register(None)
    return NAME


NAME = _Name("moe_kernels")
FP8_REASON = "there are no FP8 kernels"
_DEFAULT = "get_correct_experts_implementation"


def enable(recompute: str | None = None) -> None:
    """Accelerate every supported MoE model that Transformers builds from now on; calling it again changes the option.

    Models built without ``experts_implementation=`` get ``"moe_kernels"``; an explicit choice is respected. Models
    built before keep what they have, see :func:`patch`.

    Args:
        recompute: None, or "pre_activation" to keep less memory between forward and backward (see
            ``functional.moe_experts``). Models given one by :func:`patch` keep theirs.

    Raises:
        ValueError: an unknown ``recompute``.
    """
    _register(recompute)
    wrapped = getattr(PreTrainedModel, _DEFAULT)
    if not hasattr(wrapped, "_moe_kernels_original"):
        setattr(PreTrainedModel, _DEFAULT, _prefer_ours(wrapped))


def disable() -> None:
    """Undo :func:`enable`. Models that already hold the name go on, on Transformers' own ``grouped_mm``."""
    wrapped = getattr(PreTrainedModel, _DEFAULT)
    if hasattr(wrapped, "_moe_kernels_original"):  # else another library wrapped ours, which is inert from now on
        setattr(PreTrainedModel, _DEFAULT, wrapped._moe_kernels_original)
    if is_registered():
        ExpertsInterface.register(NAME, grouped_mm_experts_forward)
        FP8ExpertsInterface.register(NAME, FP8ExpertsInterface._global_mapping["grouped_mm"])


def is_enabled() -> bool:
    return is_registered() and hasattr(getattr(PreTrainedModel, _DEFAULT), "_moe_kernels_original")


def patch(model: nn.Module, recompute: str | None = None) -> nn.Module:
    """Switch an existing model, sub-models included, to our experts, whatever it held. Returns the model.

    Works without :func:`enable`. The choice of ``recompute`` is kept on the model's experts modules and goes along in
    ``copy.deepcopy`` and pickles; None means that of :func:`enable`.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: the model has no experts that Transformers lets be switched, or ``recompute`` is unknown.
    """
    _check_recompute(recompute)
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    experts = [module for module in model.modules() if is_switchable(module)]
    if not experts:
        raise ValueError(
            f"patch: {type(model).__name__} has no MoE layers that can be switched through Transformers' experts "
            "interface; moe_kernels.report(model) lists what it has"
        )
    if not is_registered():
        _register(None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            module.set_experts_implementation(NAME)
    for module in experts:
        module.config._experts_implementation = NAME  # experts outside any PreTrainedModel
        if recompute is None:
            module.__dict__.pop(RECOMPUTE_ATTRIBUTE, None)
        else:
            setattr(module, RECOMPUTE_ATTRIBUTE, recompute)
    return model


def is_switchable(module: nn.Module) -> bool:
    """Is it an experts module whose forward looks up ``experts_implementation``?"""
    # What Transformers' decorator sets in __init__; not hasattr, which adapters' wrappers may forward.
    return {"config", "has_gate", "is_transposed"} <= vars(module).keys()


def is_registered() -> bool:
    """Is the name bound to our function? Not before the first ``enable`` or ``patch``, and not after ``disable``."""
    function = ExpertsInterface._global_mapping.get(NAME)
    return isinstance(function, functools.partial) and function.func is moe_kernels_experts_forward


def _register(recompute: str | None) -> None:
    _check_recompute(recompute)
    ExpertsInterface.register(NAME, functools.partial(moe_kernels_experts_forward, recompute=recompute))
    # FP8 experts look names up in a registry of their own and would raise KeyError on ours.
    FP8ExpertsInterface.register(NAME, _fp8_experts_forward)


def _fp8_experts_forward(self, *args, **kwargs):
    warn_once(type(self).__name__, FP8_REASON)
    return FP8ExpertsInterface._global_mapping["grouped_mm"](self, *args, **kwargs)


def _prefer_ours(original):
    @functools.wraps(original)
    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts == NAME:
            requested_experts = NAME  # the one that can be pickled
        if requested_experts is None and is_registered() and self._can_set_experts_implementation():
            requested_experts = NAME
        return original(self, requested_experts)

    get_correct_experts_implementation._moe_kernels_original = original
    return get_correct_experts_implementation


def _check_recompute(recompute: str | None) -> None:
    if recompute not in RECOMPUTE:
        raise ValueError(f'recompute must be None or "pre_activation", got {recompute!r}')
