"""The rows of extra.json: the block under autocast with fp32 parameters, in a CUDA graph, compiled, and on the host.

What is compared with the eager step is timed in turn with it. One loop after the other would compare clocks too: under
load the products of two equal steps differ by 4 %, where those bound by memory do not.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch

from moe_kernels.bench.layer import (
    ACCUMULATE,
    FUSED_ROUTER,
    SANE,
    STOCK,
    Inaccurate,
    accumulated,
    forward_block,
    gradients,
)
from moe_kernels.bench.measure import capture, host_us, measure, medians_in_turn_ms, waiting
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import Shape

FILE = "extra.json"
OURS = "moe_kernels"
#: Whose host's time is taken; stock's eager loop waits for the GPU.
ON_THE_HOST = ("grouped_mm", OURS, FUSED_ROUTER)


def run_autocast(session: Session, shape: Shape, implementation: str) -> tuple[Callable[[], None], dict]:
    """fp32 parameters and input under bf16 autocast. They hold bf16 numbers, so the truth is that of the bf16 block."""
    layer = session.layer(shape)
    module = copy.deepcopy(layer.module("block", implementation)).float()
    x = layer.x.detach().float().requires_grad_()
    d_out = layer.d_out.float()

    def forward() -> torch.Tensor:
        with torch.autocast(layer.device, torch.bfloat16):
            return forward_block(module, x)

    leaves = x, module.gate.weight, module.experts.gate_up_proj, module.experts.down_proj
    name = f"autocast/{shape.name}/{implementation}"
    limit = SANE if implementation in STOCK else None
    layer.check(name, "block", "uniform", gradients(forward, leaves, d_out), limit=limit)
    row = measure(forward, d_out)._asdict()
    if implementation == OURS:
        bf16 = layer.forward("block", "uniform", OURS), layer.leaves("block", "uniform"), layer.d_out
        steps = {"autocast": (forward, leaves, d_out), "bf16": bf16}
        times = medians_in_turn_ms({name: functools.partial(gradients, *step) for name, step in steps.items()})
        row["over_bf16"] = times["autocast"] / times["bf16"]
    return waiting(lambda: forward().backward(d_out)), session.record(FILE, name, row)


def run_graph(session: Session, shape: Shape) -> tuple[Callable[[], None], dict]:
    """Forward and backward captured in one CUDA graph: the same results, bit for bit, and the time of a replay."""
    layer = session.layer(shape)
    forward, leaves = layer.forward("block", "uniform", OURS), layer.leaves("block", "uniform")

    def step() -> list[torch.Tensor]:
        return gradients(forward, leaves, layer.d_out)

    eager = step()
    graph, captured = capture(step)
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    name = f"graph/{shape.name}/{OURS}"
    if not all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True)):
        raise Inaccurate(f"{name}: the replay's output and gradients differ from eager ones")
    times = medians_in_turn_ms({"graph": graph.replay, "eager": step})
    row = {"step_ms": times["graph"], "eager_step_ms": times["eager"], "over_eager": times["graph"] / times["eager"]}
    return waiting(graph.replay), session.record(FILE, name, row)


def run_compile(session: Session, shape: Shape) -> tuple[Callable[[], None], dict]:
    """``torch.compile(block, fullgraph=True)``, in turn with the same block in eager mode."""
    return _compiled(session, shape, OURS, gradients)


def run_compile_accumulate(session: Session, shape: Shape) -> tuple[Callable[[], None], dict]:
    """The same where both add weight gradients to a ``.grad`` that is there."""
    return _compiled(session, shape, ACCUMULATE, accumulated)


def _compiled(session: Session, shape: Shape, implementation: str, found: Callable) -> tuple[Callable[[], None], dict]:
    layer = session.layer(shape)
    torch._dynamo.reset()
    module = torch.compile(layer.module("block", implementation), fullgraph=True)
    name = f"compile/{shape.name}/{implementation}"

    def forward() -> torch.Tensor:
        return forward_block(module, layer.x)

    eager, leaves = layer.forward("block", "uniform", implementation), layer.leaves("block", "uniform")
    layer.check(name, "block", "uniform", found(forward, leaves, layer.d_out))
    row = measure(forward, layer.d_out)._asdict()
    forwards = {"compiled": forward, "eager": eager}
    steps = {mode: functools.partial(_step, found, run, leaves, layer.d_out) for mode, run in forwards.items()}
    times = medians_in_turn_ms(steps)
    peak_mib = measure(eager, layer.d_out).peak_mib
    row |= {"over_eager": times["compiled"] / times["eager"], "peak_over_eager": row["peak_mib"] / peak_mib}
    if implementation != OURS:
        plain_mib = measure(layer.forward("block", "uniform", OURS), layer.d_out).peak_mib
        row["peak_over_plain_eager"] = row["peak_mib"] / plain_mib
    for leaf in leaves:
        leaf.grad = None
    return waiting(lambda: forward().backward(layer.d_out)), session.record(FILE, name, row)


def run_host(session: Session, shape: Shape, implementation: str) -> tuple[Callable[[], None], dict]:
    """What a block costs the host, whatever the GPU does: Python, dispatch, launches, and autograd for the step."""
    layer = session.layer(shape)
    layer.errors("block", "uniform", implementation)
    forward, leaves = layer.forward("block", "uniform", implementation), layer.leaves("block", "uniform")
    step = functools.partial(gradients, forward, leaves, layer.d_out)
    with torch.no_grad():
        no_grad_us = host_us(forward)
    row = {"forward_no_grad_us": no_grad_us, "forward_us": host_us(forward), "step_us": host_us(step)}
    return waiting(step), session.record(FILE, f"host/{shape.name}/{implementation}", row)


def _step(found: Callable, forward: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], d_out) -> None:
    """A step that makes gradients, or adds to those that are there."""
    if found is gradients:
        gradients(forward, leaves, d_out)
    else:
        forward().backward(d_out)
