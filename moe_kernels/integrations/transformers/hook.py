"""Switch Transformers' MoE models to our experts function, routers and blocks, and back.

The state lives in Transformers: a name in two registries, and two wrapped methods of its models, of which one decides
the default and one ends a model's construction. Configs never serialise the name, so checkpoints carry no trace.
"""

import functools
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from moe_kernels.integrations.transformers import families
from moe_kernels.integrations.transformers.experts import ACCUMULATE_GRAD_ATTRIBUTE, RECOMPUTE_ATTRIBUTE
from moe_kernels.integrations.transformers.registry import NAME, check_options, is_registered, is_switchable, register

#: Methods of PreTrainedModel that are wrapped.
_DEFAULT, _BUILT = "get_correct_experts_implementation", "post_init"
_ORIGINAL = "_moe_kernels_original"


def enable(recompute: str | None = None, accumulate_grad: bool = False) -> None:
    """Accelerate every supported MoE model that Transformers builds from now on; calling it again changes the options.

    Models built without ``experts_implementation=`` get ``"moe_kernels"``; an explicit choice is respected. Models
    built before keep what they have, see :func:`patch`.

    Args:
        recompute: None, or "pre_activation" to keep less memory between forward and backward (see
            ``functional.moe_experts``). Models given one by :func:`patch` keep theirs.
        accumulate_grad: add the gradients of expert weights to a ``.grad`` that is there already in the products that
            make them, so gradient accumulation needs no memory of the weights' size (see ``functional.moe_experts``
            for where autograd gets them all the same). Likewise.

    Raises:
        ValueError: an unknown ``recompute``.
        TypeError: ``accumulate_grad`` is no bool.
    """
    register(recompute, accumulate_grad)
    for name, wrap in ((_DEFAULT, _prefer_ours), (_BUILT, _swap_classes)):
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, _ORIGINAL):
            setattr(PreTrainedModel, name, _marked(wrap(method), method))


def disable() -> None:
    """Undo :func:`enable`. Models that already hold the name go on, on Transformers' own ``grouped_mm`` and on the
    forwards of their stock routers and blocks; :func:`enable` brings them back."""
    for name in (_DEFAULT, _BUILT):
        method = getattr(PreTrainedModel, name)
        if hasattr(method, _ORIGINAL):  # else another library wrapped ours, which is inert from now on
            setattr(PreTrainedModel, name, getattr(method, _ORIGINAL))
    if is_registered():
        ExpertsInterface.register(NAME, grouped_mm_experts_forward)
        FP8ExpertsInterface.register(NAME, FP8ExpertsInterface._global_mapping["grouped_mm"])


def is_enabled() -> bool:
    return is_registered() and hasattr(getattr(PreTrainedModel, _DEFAULT), _ORIGINAL)


def patch(model: nn.Module, recompute: str | None = None, accumulate_grad: bool = False) -> nn.Module:
    """Switch an existing model, sub-models included, to our experts, routers and blocks, whatever it held.

    Works without :func:`enable`. The choices of ``recompute`` and ``accumulate_grad`` are kept on the model's experts
    modules and go along in ``copy.deepcopy`` and pickles; None and False mean those of :func:`enable`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no nn.Module, or ``accumulate_grad`` no bool.
        ValueError: the model has no experts that Transformers lets be switched, or ``recompute`` is unknown.
    """
    check_options(recompute, accumulate_grad)
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    experts = [module for module in model.modules() if is_switchable(module)]
    if not experts:
        raise ValueError(
            f"patch: {type(model).__name__} has no MoE layers that can be switched through Transformers' experts "
            "interface; moe_kernels.report(model) lists what it has"
        )
    if not is_registered():
        register()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            module.set_experts_implementation(NAME)
    for module in experts:
        module.config._experts_implementation = NAME  # experts outside any PreTrainedModel
        for name, choice in ((RECOMPUTE_ATTRIBUTE, recompute), (ACCUMULATE_GRAD_ATTRIBUTE, accumulate_grad)):
            if choice:
                setattr(module, name, choice)
            else:
                module.__dict__.pop(name, None)
    families.swap(model)
    return model


def _prefer_ours(original: Callable) -> Callable:
    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts == NAME:
            requested_experts = NAME  # the one that can be pickled
        if requested_experts is None and is_registered() and self._can_set_experts_implementation():
            requested_experts = NAME
        return original(self, requested_experts)

    return get_correct_experts_implementation


def _swap_classes(original: Callable) -> Callable:
    def post_init(self):
        original(self)
        if is_registered():
            families.swap(self)

    return post_init


def _marked(wrapper: Callable, original: Callable) -> Callable:
    functools.update_wrapper(wrapper, original)
    setattr(wrapper, _ORIGINAL, original)
    return wrapper
