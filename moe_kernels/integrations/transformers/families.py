"""Routers and blocks of a model become ours by a change of class, and stock again.

The class is a subclass of the stock one under the same name, so that isinstance, recorders, checkpoints and messages
see the stock module; parameters and buffers are untouched. It runs stock's own forward wherever the module's config
doesn't ask for us. Which classes: by the fingerprint of their source, so a class that a new release of Transformers
edits is left alone.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from moe_kernels.integrations.transformers import blocks, routers
from moe_kernels.integrations.transformers.fingerprint import fingerprint
from moe_kernels.integrations.transformers.registry import is_switchable

_STOCK = "_moe_kernels_stock"  # on our classes: the one they stand for


class Part(NamedTuple):
    """A router or a block of a model."""

    name: str
    kind: str  # "router" or "block"
    module: nn.Module
    experts: nn.Module


def parts(model: nn.Module) -> Iterator[Part]:
    """Every router and block that stands with experts that Transformers lets be switched."""
    for name, block in model.named_modules():
        experts = experts_of(block)
        if experts is None:
            continue
        prefix = f"{name}." if name else ""
        for child_name, child in block.named_children():
            if _looks_like_a_router(child_name, child):
                yield Part(prefix + child_name, "router", child, experts)
        if fingerprint(stock_class(type(block))) not in blocks.NOTHING_TO_FUSE:
            yield Part(name, "block", block, experts)


def experts_of(block: nn.Module) -> nn.Module | None:
    """The experts that a block holds, under whatever an adapter wraps them in."""
    found = block._modules.get("experts")
    while found is not None and not is_switchable(found):
        found = found._modules.get("base_layer")  # PEFT
    return found


def swap(model: nn.Module) -> None:
    """Give every router and block of the model that we know our class. Twice is once."""
    for _, kind, module, experts in list(parts(model)):
        if why_stays_stock(kind, module) is None:
            module.__class__ = ours(type(module))
            if kind == "router":
                setattr(module, routers.CONFIG_ATTRIBUTE, experts.config)


def restore(model: nn.Module) -> None:
    """Give every module of the model its stock class back."""
    for module in model.modules():
        if _STOCK in vars(type(module)):
            module.__class__ = stock_class(type(module))
            vars(module).pop(routers.CONFIG_ATTRIBUTE, None)


def why_stays_stock(kind: str, module: nn.Module) -> str | None:
    """Why the module does not get our class, or None."""
    if is_ours(module):
        return None
    if "forward" in vars(module):  # it holds on to stock's
        return "another library runs its forward; enable moe_kernels before the model is built"
    digits = fingerprint(type(module))
    home, rules = (routers, routers.ROUTERS) if kind == "router" else (blocks, blocks.BLOCKS)
    if digits in home.STAYS_STOCK:
        return home.STAYS_STOCK[digits]
    if digits in rules:
        return home.why_not(module, rules[digits])
    if "self_attn" in module._modules:
        return "it is a whole layer, with experts beside a dense MLP"
    return f"no rule for its source ({digits})"


def is_ours(module: nn.Module) -> bool:
    return hasattr(type(module), _STOCK)  # through the subclasses that PEFT and FSDP make


def stock_class(cls: type) -> type:
    return getattr(cls, _STOCK, cls)


def ours(stock: type) -> type:
    """The class that stands for ``stock``; itself when there is no rule for its source, or it is ours."""
    return stock if hasattr(stock, _STOCK) else _ours(stock, stock.forward)


@functools.cache
def _ours(stock: type, stock_forward: Callable) -> type:
    digits = fingerprint(stock)
    home = routers if digits in routers.ROUTERS else blocks
    rule = routers.ROUTERS.get(digits) or blocks.BLOCKS.get(digits)
    if rule is None:
        return stock

    def __reduce_ex__(self, protocol):
        made = super(cls, self).__reduce_ex__(max(protocol, 2))
        # A subclass (a parametrization, FSDP) stands under no name either, and says so itself.
        return made if type(self) is not cls else (rebuild, (stock,), *made[2:])

    members = {
        "forward": functools.wraps(stock_forward)(home.adapter(rule, stock_forward)),
        "__reduce_ex__": __reduce_ex__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        _STOCK: stock,
    }
    cls = type(stock)(stock.__name__, (stock,), members)
    return cls


def rebuild(stock: type) -> nn.Module:
    """What a pickle of one of our modules calls: also in a process that never imported us, and with another release."""
    return (cls := ours(stock)).__new__(cls)


def _looks_like_a_router(name: str, module: nn.Module) -> bool:
    digits = fingerprint(stock_class(type(module)))
    return digits in routers.ROUTERS or digits in routers.STAYS_STOCK or name in ("gate", "router")
