"""Time and memory of a forward and backward, and the bound to hold them against."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.bench.shapes import Shape

MIB = 2**20


class Measured(NamedTuple):
    forward_ms: float
    backward_ms: float
    step_ms: float
    held_mib: float  # between forward and backward, beyond parameters, gradients, input and output
    peak_mib: float  # highest over the step, beyond the same; temporary weight gradients count


def median_ms(run: Callable[[], object], repeats: int = 20, prepare: Callable[[], object] | None = None) -> float:
    """Median GPU time of ``run`` between two events, after three warm-ups; ``prepare`` runs before each, untimed."""
    times = []
    for i in range(repeats + 3):
        if prepare is not None:
            prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        if i >= 3:
            times.append((start, end))
    torch.cuda.synchronize()
    elapsed = sorted(start.elapsed_time(end) for start, end in times)
    return elapsed[len(elapsed) // 2]


def measure(forward: Callable[[], Tensor], d_out: Tensor, leaves: list[Tensor], repeats: int = 20) -> Measured:
    """Forward, backward and both, with ``.grad`` of every leaf already allocated, as in training with accumulation."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    state = {}

    def run_forward():
        state["out"] = forward()

    def run_backward():
        state.pop("out").backward(d_out)

    def step():
        forward().backward(d_out)

    step()
    forward_ms = median_ms(run_forward, repeats, prepare=state.clear)
    backward_ms = median_ms(run_backward, repeats, prepare=run_forward)
    step_ms = median_ms(step, repeats)

    state.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    output_bytes = out.numel() * out.element_size()
    held = torch.cuda.memory_allocated() - before - output_bytes
    out.backward(d_out)
    peak = torch.cuda.max_memory_allocated() - before - output_bytes
    del out
    for leaf in leaves:
        leaf.grad = None
    return Measured(forward_ms, backward_ms, step_ms, held / MIB, peak / MIB)


def copy_rate() -> float:
    """Device-to-device copy in bytes per second, read + written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) * 1e3


def matmul_rate(size: int = 8192) -> float:
    """FLOP/s of one large bf16 product of random operands."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / median_ms(lambda: a @ a) * 1e3


def bound_ms(shape: Shape, rows_per_expert: Tensor, bytes_per_second: float) -> dict[str, float]:
    """t_b: the six products by torch.bmm on equal groups, times the padding of each expert's rows to 64, plus the
    bytes of the combines at this run's copy rate. It has no gather, no activation and no router."""
    per_expert = shape.rows // shape.E

    def bmm(m: int, k: int, n: int) -> float:
        a = torch.randn(shape.E, m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(shape.E, k, n, device="cuda", dtype=torch.bfloat16)
        return median_ms(lambda: torch.bmm(a, b))

    products = {
        "up": bmm(per_expert, shape.D, 2 * shape.I),
        "down": bmm(per_expert, shape.I, shape.D),
        "d_a": bmm(per_expert, shape.D, shape.I),
        "dx": bmm(per_expert, 2 * shape.I, shape.D),
        "dw_gate_up": bmm(2 * shape.I, per_expert, shape.D),
        "dw_down": bmm(shape.D, per_expert, shape.I),
    }
    padding = float(((rows_per_expert + 63) // 64 * 64).sum()) / shape.rows
    combine = 2 * (shape.rows + shape.T) * shape.D / bytes_per_second * 1e3
    forward = (products["up"] + products["down"]) * padding + combine
    step = sum(products.values()) * padding + 2 * combine
    return {**products, "padding": padding, "combine": combine, "forward": forward, "step": step}
