"""The rows of block.json: a whole MoE block, and its experts alone, forward and backward, beside stock and peers."""

import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from moe_kernels.bench import ceilings, peers
from moe_kernels.bench.layer import ACCUMULATE, FUSED_ROUTER, STOCK, YARDSTICK, Layer, backend_of
from moe_kernels.bench.measure import measure, medians_in_turn_ms, waiting
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import DEFAULT_SHAPES, Shape

FILE = "block.json"
EXPERTS = (YARDSTICK, "moe_kernels", "moe_kernels_recompute")
#: Stock eager loops over the experts and adds a [T, D] gradient for each: 0.3 s a step here, and that is enough.
_MOST_EAGER = 128 * 16384
#: Stock batched_mm copies the weights of every (token, expert) pair, three times over a step.
_MOST_BATCHED_BYTES = 24 * 2**30


class Case(NamedTuple):
    what: str  # block: its router chooses, on random data uniformly; experts: routing given
    shape: Shape
    routing: str
    implementation: str

    @property
    def name(self) -> str:
        return f"{self.what}/{self.shape.name}/{self.routing}/{self.implementation}"


def cases(shape: Shape, routings: Iterable[str] = ("uniform",)) -> list[Case]:
    """What is measured of a shape. Stock comes first, so that a row can be held against it."""
    implementations = [name for name in STOCK if why_left_out(name, shape) is None] + ["moe_kernels"]
    if shape.name == DEFAULT_SHAPES[0]:  # one shape shows what the choices do
        implementations += ["moe_kernels_recompute", "moe_kernels_triton", ACCUMULATE, FUSED_ROUTER]
    return [Case("block", shape, "uniform", name) for name in implementations] + [
        Case("experts", shape, kind, name) for kind in routings for name in EXPERTS
    ]


def on_every_shape(shape: Shape) -> list[Case]:
    """What is measured of all shapes: ours, and before it stock where :func:`cases` isn't measured by default."""
    names = ("moe_kernels",) if shape.name in DEFAULT_SHAPES else (YARDSTICK, "moe_kernels")
    return [Case("experts", shape, "uniform", name) for name in names]


def left_out(shape: Shape) -> list[tuple[Case, str]]:
    """The stock blocks that :func:`cases` lacks, each with the reason."""
    reasons = {name: why_left_out(name, shape) for name in STOCK}
    return [(Case("block", shape, "uniform", name), reason) for name, reason in reasons.items() if reason is not None]


def why_left_out(implementation: str, shape: Shape, backward: bool = True) -> str | None:
    """The reason why it isn't worth timing there, or None. What takes seconds or all the memory says nothing."""
    if implementation == "eager" and shape.E * shape.T > _MOST_EAGER:
        return f"left out: a step would loop over {shape.E} experts and add a [{shape.T}, {shape.D}] gradient for each"
    if implementation == "batched_mm":
        copied = batched_bytes(shape) * (3 if backward else 1)
        if copied > _MOST_BATCHED_BYTES:
            return f"left out: it would copy {copied / 2**30:.0f} GiB of weights"
    return None


def batched_bytes(shape: Shape) -> int:
    return shape.rows * 3 * shape.I * shape.D * 2


def run(session: Session, case: Case) -> tuple[Callable[[], None], dict]:
    """Check, measure and record one case: a step for a clock on the host, and its row."""
    layer, shape = session.layer(case.shape), case.shape
    errors = layer.errors(case.what, case.routing, case.implementation)
    forward = layer.forward(case.what, case.routing, case.implementation)
    with backend_of(case.implementation):
        measured = measure(forward, layer.d_out)
    row = measured._asdict()
    row["forward_tflops"] = shape.forward_flops / measured.forward_ms / 1e9
    row["step_tflops"] = 3 * shape.forward_flops / measured.step_ms / 1e9
    if case.what == "experts":
        row |= _compared(session, case)
    if case.implementation == ACCUMULATE:
        row["over_plain"] = _over_plain(layer, case)
    if case.routing == "uniform" and (case.what == "experts" or case.implementation not in EXPERTS):
        session.record(FILE, f"error/{shape.name}/{case.implementation}", errors)

    def step() -> None:
        with backend_of(case.implementation):
            forward().backward(layer.d_out)

    return waiting(step), session.record(FILE, case.name, row)


def run_if_it_fits(session: Session, case: Case) -> tuple[Callable[[], None], dict] | str:
    """As :func:`run`; where stock lacks the memory, the reason, which is recorded in place of its figures."""
    try:
        return run(session, case)
    except torch.OutOfMemoryError as error:
        if case.implementation not in STOCK:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what it had allocated
        reason = f"out of memory: {str(error).splitlines()[0]}"
    for leaf in session.layer(case.shape).leaves(case.what, case.routing):
        leaf.grad = None
    session.record(FILE, case.name, {"reason": reason})
    return reason


def _over_plain(layer: Layer, case: Case) -> float:
    """The time of a step that finds a ``.grad``, as a multiple of ``moe_kernels``', in turn."""

    def step_of(implementation: str) -> Callable[[], None]:
        forward = layer.forward(case.what, case.routing, implementation)
        return lambda: forward().backward(layer.d_out)

    times = medians_in_turn_ms({name: step_of(name) for name in (ACCUMULATE, "moe_kernels")})
    for leaf in layer.leaves(case.what, case.routing):
        leaf.grad = None
    return times[ACCUMULATE] / times["moe_kernels"]


def _compared(session: Session, case: Case) -> dict:
    """The experts beside themselves on the uniform routing, and ours beside the bound."""
    compared = {} if case.implementation in STOCK else _over_bound(session, case)
    if case.routing != "uniform":
        compared["step_over_uniform"] = _over_uniform(session, case)
    return compared


def _over_uniform(session: Session, case: Case) -> float:
    """The time of a step as a multiple of that on the uniform routing, in turn."""
    layer = session.layer(case.shape)
    steps = {kind: _fresh_step(layer, case._replace(routing=kind)) for kind in (case.routing, "uniform")}
    with backend_of(case.implementation):
        times = medians_in_turn_ms(steps)
    return times[case.routing] / times["uniform"]


def _fresh_step(layer: Layer, case: Case) -> Callable[[], None]:
    """A step that finds no ``.grad``; to be called inside ``backend_of``."""
    forward = layer.forward(case.what, case.routing, case.implementation)
    leaves = layer.leaves(case.what, case.routing)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(layer.d_out)

    return step


def _over_bound(session: Session, case: Case) -> dict:
    """Forward and step as multiples of t_b, whose products run in turn with them."""
    layer, shape = session.layer(case.shape), case.shape
    forward = layer.forward(case.what, case.routing, case.implementation)
    with backend_of(case.implementation):
        times = medians_in_turn_ms(ceilings.products(shape) | {"forward": forward, "step": _fresh_step(layer, case)})
    bound = session.bound(shape, case.routing, times)
    if case.routing == "uniform" and case.implementation == "moe_kernels":
        session.record(FILE, f"bound/{shape.name}", bound)
    return {f"{part}_over_bound": times[part] / bound[f"{part}_ms"] for part in ("forward", "step")}


def run_peer(session: Session, shape: Shape, name: str, cap_s: float | None = None) -> str | None:
    """Measure and record a peer's block, in a process of its own; the reason if there is nothing to record, or less.

    Args:
        cap_s: seconds its first call may take; default: the peer's own.
    """
    session.release()  # the other process needs the memory
    rows = peers.measure_peer(name, shape, cap_s)
    reason = rows.pop("reason", None)
    for row_name, row in rows.items():
        session.record(FILE, row_name, row if reason is None else row | {"reason": reason})
    return reason
