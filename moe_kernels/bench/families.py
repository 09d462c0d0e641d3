"""The rows of families.json: one layer's whole MoE block of each family at real size, beside stock and its bound.

The bound t_b of a block is that of its routed experts plus the matrices that every token passes through (router,
shared expert, latent projections), each with its two products of the backward, by cuBLAS in the same run.

The largest layers just fit on 80 GB. DeepSeek-V3: 22.6 GB of weights, as much again of gradients and, in a step that
adds to gradients, a new one of 15.0 GB beside them; then come the rows, 2 GB of ours and some 10 GB of stock's. The
bound's operands, 51 GB and 25 GB of outputs, are therefore timed before the layer is built, and the truth is made one
expert at a time.
"""

import functools
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import patch, report
from moe_kernels.bench import ceilings
from moe_kernels.bench.family_models import Model, router_of
from moe_kernels.bench.family_truth import relative_errors
from moe_kernels.bench.layer import SANE, SLACK, TIMES_YARDSTICK, YARDSTICK, Inaccurate, gradients
from moe_kernels.bench.measure import measure, medians_in_turn_ms, waiting
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import Kind, Shape

FILE = "families.json"
OURS = "moe_kernels"
TOKENS = 8192
_FORWARD, _BACKWARD = "_forward", "_backward"
#: Logits this close are a tie, of which either may be chosen: in bf16 they are equal, in fp32 sums differ by the order.
_TIE = 1e-4
#: The share of tokens that may be sent elsewhere without one: what decides is a score plus a bias. A router that leaves
#: out the bias or the groups sends every fifth token elsewhere.
_MOST_ELSEWHERE = 0.01
#: What a run takes at its peak, which is the bound's operands and outputs, as a multiple of the experts' weights.
_TIMES_WEIGHTS = 3.5

#: What the rows of errors call a parameter's gradient; of the others it is d_<name>.
_GRADIENTS = {
    "x": "dx",
    "gate.weight": "d_router",
    "router.weight": "d_router",
    "router.bias": "d_router_bias",
    "experts.gate_up_proj": "dw_gate_up",
    "experts.up_proj": "dw_up",
    "experts.down_proj": "dw_down",
    "experts.gate_up_proj_bias": "d_bias_gate_up",
    "experts.down_proj_bias": "d_bias_down",
}


class Choice(NamedTuple):
    """What a router chose."""

    logits_TE: Tensor
    indices_TK: Tensor


class Layer:
    """The block of a model, with random weights, unit-scale input and output gradient, bf16."""

    def __init__(self, model: Model, tokens: int, device: str):
        self.model = model
        self.block = model.build(device)
        self.x = torch.randn(tokens, model.sizes["D"], device=device, dtype=torch.bfloat16, requires_grad=True)
        self.d_out = torch.randn_like(self.x)

    def forward(self) -> Tensor:
        out = self.block(self.x.unsqueeze(0))
        out = out[0] if isinstance(out, tuple) else out  # gpt-oss returns its routing weights too
        return out.view(self.x.shape)

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, **dict(self.block.named_parameters())}

    def errors(self) -> tuple[dict[str, float], Choice]:
        """Relative errors of the output and of every gradient, and the router's choice."""
        leaves, choices = self.leaves(), []
        hook = router_of(self.block).register_forward_hook(lambda *call: choices.append(call[2]))
        try:
            values = gradients(self.forward, list(leaves.values()), self.d_out)
        finally:
            hook.remove()
        logits, _, indices = choices[0]
        found = dict(zip(("out", *leaves), values, strict=True))
        errors = relative_errors(self.model, self.block, self.x, self.d_out, indices, found)
        return {_label(name): error for name, error in errors.items()}, Choice(logits.detach(), indices)


def _label(name: str) -> str:
    return "out" if name == "out" else _GRADIENTS.get(name, f"d_{name.removesuffix('.weight')}")


# The bound


def products(model: Model, tokens: int, device: str) -> dict[str, Callable[[], object]]:
    """The six products of the routed experts and, by part and direction, those of the matrices."""
    block, shape = model.build("meta"), model.experts_shape(tokens)
    if not block.experts.has_gate:
        shape = shape._replace(kind=Kind("relu2"))
    runs = ceilings.products(shape, device=device)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    for part, sizes in matrices(block).items():
        operands = [(random(tokens, n_in), random(n_out, n_in), random(tokens, n_out)) for n_in, n_out in sizes]
        runs[part + _FORWARD] = functools.partial(_forward_products, operands)
        runs[part + _BACKWARD] = functools.partial(_backward_products, operands)
    return runs


def matrices(block: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """The (in, out) sizes of what every token passes through, by the part of the block that it belongs to."""
    found = {"router": [tuple(reversed(router_of(block).weight.shape))]}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault("latent" if "latent" in name else "shared", []).append(
                (module.in_features, module.out_features)
            )
    return found


def _forward_products(operands: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    return [x @ w.T for x, w, _ in operands]


def _backward_products(operands: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(d_out @ w, d_out.T @ x) for x, w, d_out in operands]


def bound(shape: Shape, times: dict[str, float], padded: float, bytes_per_second: float) -> dict[str, float]:
    """t_b of the block, and that of its routed experts alone."""
    dense = {name: ms for name, ms in times.items() if name.endswith((_FORWARD, _BACKWARD))}
    routed = {name: ms for name, ms in times.items() if name not in dense}
    experts = ceilings.bound(shape, routed, padded, bytes_per_second)
    return experts | {
        **{f"{name}_ms": ms for name, ms in dense.items()},
        "experts_forward_ms": experts["forward_ms"],
        "experts_step_ms": experts["step_ms"],
        "forward_ms": experts["forward_ms"] + sum(ms for name, ms in dense.items() if name.endswith(_FORWARD)),
        "step_ms": experts["step_ms"] + sum(dense.values()),
    }


# The rows


def why_not(model: Model, memory_bytes: int) -> str | None:
    """The reason why it can't run on a GPU with this much memory, or None."""
    needed = _TIMES_WEIGHTS * sum(parameter.nbytes for parameter in model.build("meta").experts.parameters())
    return f"it needs {needed / 2**30:.0f} GiB of memory" if needed > memory_bytes else None


def run(session: Session, model: Model, tokens: int = TOKENS) -> tuple[Callable[[], None], dict]:
    """Check, measure and record stock and ours: a step of ours for a clock on the host, and its row."""
    try:
        return _run(session, model, tokens)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # or the layer would live as long as the traceback does
        raise


def _run(session: Session, model: Model, tokens: int) -> tuple[Callable[[], None], dict]:
    say = _progress(model)
    say("bound")
    session.release()
    times = medians_in_turn_ms(products(model, tokens, session.device))
    say("layer")
    session.release()
    layer = Layer(model, tokens, session.device)

    def bound_of(choice: Choice) -> dict[str, float]:
        counts = torch.bincount(choice.indices_TK.flatten(), minlength=model.sizes["E"])
        row = bound(model.experts_shape(tokens), times, ceilings.padding(counts), session.bytes_per_second)
        return session.record(FILE, f"bound/{model.name}", row)

    say("stock")
    stock = _stock(layer)
    session.release()
    t_b = None if stock.choice is None else bound_of(stock.choice)
    if stock.errors is not None:
        session.record(FILE, f"error/{model.name}/{YARDSTICK}", stock.errors)
    session.record(FILE, _name(model, YARDSTICK), stock.row | _over(stock.row, t_b))

    say("ours, against fp32")
    patch(layer.block)
    errors, choice = layer.errors()
    session.release()
    compared = _compared(model, errors, choice, stock)
    session.record(FILE, f"error/{model.name}/{OURS}", errors | compared)
    t_b = t_b or bound_of(choice)
    say("ours, timed")
    row = measure(layer.forward, layer.d_out)._asdict()
    row |= _over(row, t_b) | _parts(layer.block)
    if "step_ms" in stock.row:
        row["times_stock"] = stock.row["step_ms"] / row["step_ms"]
    row = session.record(FILE, _name(model, OURS), row)
    say(f"done, {row['step_over_bound']:.2f} t_b")
    return waiting(lambda: layer.forward().backward(layer.d_out)), row


def _name(model: Model, implementation: str) -> str:
    return f"block/{model.name}/uniform/{implementation}"


class Stock(NamedTuple):
    """What Transformers' default makes of a layer; where it lacks the memory, as far as it came."""

    errors: dict[str, float] | None
    choice: Choice | None
    row: dict[str, float | str]


def _stock(layer: Layer) -> Stock:
    errors = choice = None
    try:
        errors, choice = layer.errors()
        _refuse(layer.model, YARDSTICK, errors, dict.fromkeys(errors, SANE))
        row = measure(layer.forward, layer.d_out)._asdict()
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        for leaf in layer.leaves().values():
            leaf.grad = None
        what = "checked" if errors is None else "timed"
        row = {"reason": f"out of memory when {what}: {str(error).splitlines()[0]}"}
    return Stock(errors, choice, row)


def _over(row: dict, t_b: dict[str, float] | None) -> dict[str, float]:
    """A row beside the bound."""
    if t_b is None or "step_ms" not in row:
        return {}
    return {f"{what}_over_bound": row[f"{what}_ms"] / t_b[f"{what}_ms"] for what in ("forward", "step")}


def _compared(model: Model, errors: dict[str, float], choice: Choice, stock: Stock) -> dict[str, float]:
    """Ours beside stock, each against the truth for its own choice; :class:`Inaccurate` if it is worse, or chose so."""
    if stock.errors is None or stock.choice is None:
        _refuse(model, OURS, errors, dict.fromkeys(errors, SANE))
        return {}
    allowed = {name: TIMES_YARDSTICK * error + SLACK for name, error in stock.errors.items()}
    _refuse(model, OURS, errors, allowed)
    elsewhere, without_tie = _elsewhere(stock.choice, choice)
    if without_tie > _MOST_ELSEWHERE * choice.indices_TK.shape[0]:
        raise Inaccurate(f"{_name(model, OURS)}: {without_tie} tokens go to experts with other logits than stock's")
    return {
        "over_plain": max(errors[name] / stock.errors[name] for name in errors),
        "tokens_elsewhere": elsewhere,
        "tokens_elsewhere_without_tie": without_tie,
    }


def _refuse(model: Model, implementation: str, errors: dict[str, float], allowed: dict[str, float]) -> None:
    for name, error in errors.items():
        if not error < allowed[name]:  # NaN too
            label = f"{_name(model, implementation)}: relative error of {name}"
            raise Inaccurate(f"{label} is {error:.2e}, allowed {allowed[name]:.2e}")


def _elsewhere(stock: Choice, ours: Choice) -> tuple[int, int]:
    """How many tokens go to other experts than stock's, and how many of them to experts with other logits."""
    experts = [choice.indices_TK.sort(-1).values for choice in (stock, ours)]
    logits = [stock.logits_TE.float().gather(-1, choice.indices_TK).sort(-1).values for choice in (stock, ours)]
    differ = (experts[0] != experts[1]).any(-1)
    return int(differ.sum()), int((differ & ((logits[0] - logits[1]).abs() > _TIE).any(-1)).sum())


def _parts(block: nn.Module) -> dict[str, str | int]:
    """What runs the block's experts, its router and, where it holds more, the whole of it."""
    found = report(block)
    rows = (*found.layers, *found.routers, *found.blocks)
    said = {row.kind: row.backend if row.accelerated else f"stock: {row.reason}" for row in rows}
    return said | {"parts": len(rows), "parts_accelerated": sum(row.accelerated for row in rows)}


def _progress(model: Model) -> Callable[[str], None]:
    """A run takes seconds a model, most of them in compilers: says what it is at."""
    start = time.perf_counter()
    return lambda what: print(f"{model.name}, {time.perf_counter() - start:.1f} s: {what}", flush=True)
