"""What runs on our kernels in a model, what doesn't, and why."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Experts

from moe_kernels.functional._autocast import products_dtype
from moe_kernels.integrations.transformers import blocks, families, routers
from moe_kernels.integrations.transformers.experts import choose_backend, facts, judge, weights
from moe_kernels.integrations.transformers.registry import (
    FP8_REASON,
    NAME,
    accumulates_grad,
    is_registered,
    is_switchable,
)

NOT_SWITCHABLE = "not switchable through Transformers' experts interface"
EXPERTS_ON_STOCK = "its experts run on stock"
_DISABLED = "moe_kernels is disabled; moe_kernels.enable() brings it back"


class Row(NamedTuple):
    name: str  # of the module in the model
    kind: str  # "experts", "router" or "block"
    class_name: str
    implementation: str  # what the model's config asks for
    backend: str  # of our ops, or "stock"
    accelerated: bool
    reason: str  # why not; empty when accelerated
    accumulate_grad: bool = False  # of experts: their weights' gradients are added to a ``.grad`` that is there


@dataclass(frozen=True)
class Report:
    model: str
    layers: tuple[Row, ...]  # the experts of each MoE layer
    routers: tuple[Row, ...] = ()
    blocks: tuple[Row, ...] = ()  # those with more in them than a router and experts

    @property
    def accelerated(self) -> int:
        """How many of the layers run their experts on our ops."""
        return sum(row.accelerated for row in self.layers)

    def __str__(self) -> str:
        """A plain table; equal rows of consecutive layers are folded into one."""
        if not self.layers:
            return self._title()
        table = [("layer", "class", "implementation", "backend", "why not accelerated"), *self._folded()]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [" ".join(cell.ljust(width + 1) for cell, width in zip(line, widths)) + line[4] for line in table]
        return "\n".join([self._title(), *(line.rstrip() for line in lines)])

    def __rich__(self):
        from rich.table import Table

        table = Table("layer", "class", "implementation", "backend", "why not accelerated", title=self._title())
        for line in self._folded():
            table.add_row(*line, style="green" if not line[4] else "yellow")
        return table

    def _title(self) -> str:
        if not self.layers:
            return f"{self.model}: no MoE layers"
        title = f"{self.model}: {self.accelerated} of {len(self.layers)} MoE layers accelerated"
        for name, rows in (("routers", self.routers), ("blocks", self.blocks)):
            if rows:
                title += f", {sum(row.accelerated for row in rows)} of {len(rows)} {name}"
        return title

    def _folded(self) -> list[tuple[str, str, str, str, str]]:
        groups: list[tuple[Row, list[str]]] = []
        for row in (*self.layers, *self.routers, *self.blocks):
            if groups and groups[-1][0][1:] == row[1:]:
                groups[-1][1].append(row.name)
            else:
                groups.append((row, [row.name]))
        return [
            (
                _span(names),
                row.class_name,
                row.implementation + ", accumulate_grad" * row.accumulate_grad,
                row.backend,
                row.reason,
            )
            for row, names in groups
        ]


def _span(names: list[str]) -> str:
    """model.layers.0..47.mlp.experts (48)"""
    if len(names) == 1:
        return names[0]
    parts = [a if a == b else f"{a}..{b}" for a, b in zip(names[0].split("."), names[-1].split("."))]
    return f"{'.'.join(parts)} ({len(names)})"


def report(model: nn.Module) -> Report:
    """List the experts, routers and blocks of the model's MoE layers: what runs each, and why it isn't accelerated.

    The dtype is that of the weights, or autocast's when called inside autocast. Changes nothing and runs nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    rows = []
    for name, module in model.named_modules():
        if is_switchable(module):
            rows.append(_switchable(name, module))
        elif name.rpartition(".")[2] == "experts" and not any(map(is_switchable, module.modules())):
            rows.append(_stock(name, module, "", NOT_SWITCHABLE))
    parts = {"router": [], "block": []}
    for part in families.parts(model):
        parts[part.kind].append(_part(part))
    return Report(type(model).__name__, tuple(rows), tuple(parts["router"]), tuple(parts["block"]))


def _switchable(name: str, module: nn.Module) -> Row:
    implementation = module.config._experts_implementation
    if implementation != NAME:
        return _stock(name, module, implementation, _other_implementation(implementation))
    if not is_registered():
        return _stock(name, module, implementation, _DISABLED)
    if isinstance(module, FP8Experts):
        return _stock(name, module, implementation, FP8_REASON)
    up, down = map(_local, weights(module))
    seen = facts(module, up, down)
    _, reason = judge(seen)
    if reason is None:
        try:
            backend, reason = choose_backend(seen, up.device, products_dtype(up, up.device.type))
        except RuntimeError as error:  # a forced backend that can't run: the forward will raise the same
            reason = str(error)
    if reason is not None:
        return _stock(name, module, implementation, reason)
    return Row(name, "experts", _class_name(module), implementation, backend, True, "", accumulates_grad(module))


def _part(part: families.Part) -> Row:
    """The row of a router or a block."""
    name, kind, module, experts = part
    implementation, backend = experts.config._experts_implementation, ""
    if implementation != NAME:
        reason = _other_implementation(implementation)
    elif not is_registered():
        reason = _DISABLED
    elif (reason := families.why_stays_stock(kind, module)) is None and not families.is_ours(module):
        reason = "built before moe_kernels was enabled; moe_kernels.patch(model) switches it"
    elif reason is None and kind == "block":
        backend, reason = _of_block(module, experts)
    elif reason is None:
        backend, reason = _of_router(module)
    if reason is not None:
        return _stock(name, module, implementation, reason, kind)
    return Row(name, kind, _class_name(module), implementation, backend, True, "")


def _of_block(module: nn.Module, experts: nn.Module) -> tuple[str, str | None]:
    reason, row = blocks.why_not_now(module), _switchable("", experts)
    if reason is None and not row.accelerated:
        reason = EXPERTS_ON_STOCK
    return row.backend, reason


def _of_router(module: nn.Module) -> tuple[str, str | None]:
    weight = next(module.parameters())
    try:
        return routers.choose_backend(weight.device, weight.dtype)
    except RuntimeError as error:
        return "", str(error)


def _other_implementation(implementation: str | None) -> str:
    if implementation == "grouped_mm":  # what Transformers fills in when nobody asks
        return (
            "holds Transformers' grouped_mm (built before moe_kernels was enabled, or chosen); "
            "moe_kernels.patch(model) switches it"
        )
    return f"experts_implementation={implementation!r} was chosen; moe_kernels.patch(model) switches it"


def _stock(name: str, module: nn.Module, implementation: str | None, reason: str, kind: str = "experts") -> Row:
    return Row(name, kind, _class_name(module), implementation or "", "stock", False, reason)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")  # torch's and PEFT's made-up subclasses


def _local(weight: Tensor) -> Tensor:
    """What the experts see: FSDP2, TP and EP turn a sharded weight into a plain tensor before the forward."""
    return weight.to_local() if hasattr(weight, "to_local") else weight  # a DTensor
