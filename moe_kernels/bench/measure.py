"""The clocks: a training step's time and memory, one short call on the GPU, one call as a loop sees it.

Warm and cold: a step is timed in a loop of steps, so it finds in L2 what the step before it left there, as in training,
and its weights and activations are far larger than L2. ``graph_us`` is given as many inputs as it takes to be cold.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIB = 2**20
WARM_UPS = 3
REPEATS = 20
#: Steps above 25 ms, of peers and of the largest shapes, are repeated less often, but five times at least.
_LONG_MS, _FEWEST = 500, 5
#: How far the GPU is kept behind the host, as a multiple of the host's time, and the longest single delay.
_MARGIN, _MOST_DELAY_MS = 1.25, 20
#: Highest clock of a GPU; at a lower one a delay takes longer, which is as well.
_CYCLES_PER_MS = 2_000_000
#: A graph holds calls for this long by the host's clock, so that its own start (some µs) does not count.
_GRAPH_MS, _REPLAYS = 4, 10


class Measured(NamedTuple):
    forward_ms: float
    backward_ms: float
    step_ms: float
    step_accumulate_ms: float  # the step with the gradients added to those of an earlier one
    held_mib: float  # between forward and backward, beyond parameters, gradients, input and output
    peak_mib: float  # highest over the step, beyond the same; temporary weight gradients count
    host_ms: float  # the host's time to enqueue a step, or to wait for the GPU where the step does


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _delay(ms: float) -> None:
    """Keep the GPU from what is enqueued next."""
    if ms > 0:
        torch.cuda._sleep(int(min(ms, _MOST_DELAY_MS) * _CYCLES_PER_MS))


def waiting(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` with a wait for the GPU, for a clock on the host."""

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait


def median_ms(run: Callable[[], object], repeats: int = REPEATS, prepare: Callable[[], object] | None = None) -> float:
    """Median GPU time of ``run`` between two events, after three warm-ups; ``prepare`` runs before each, untimed.

    The host runs ahead, so for anything that takes the GPU longer than the host this is GPU time.
    """
    spans = []
    for _ in range(WARM_UPS + repeats):
        if prepare is not None:
            prepare()
        start = _mark()
        run()
        spans.append((start, _mark()))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans[WARM_UPS:])


def medians_in_turn_ms(
    runs: Mapping[str, Callable[[], object]], repeats: int = REPEATS, prepare: Callable[[], object] | None = None
) -> dict[str, float]:
    """The median of each when all run in turn, as the parts of a step do: they share its clocks and its heat.

    ``prepare`` runs before each turn, untimed. The host is ahead all the time, as in :func:`measure`: where the GPU
    does a turn faster than the host enqueues it, a delay before it makes up for that.
    """

    def turn(delay_ms: float = 0) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        _delay(delay_ms)
        if prepare is not None:
            prepare()
        marks = []
        for run in runs.values():
            start = _mark()
            run()
            marks.append((start, _mark()))
        return marks

    lead_ms = _MARGIN * statistics.median(_host_ms(turn) for _ in range(WARM_UPS))
    torch.cuda.synchronize()
    alone = turn(lead_ms)
    torch.cuda.synchronize()
    gpu_ms = sum(start.elapsed_time(end) for start, end in alone)
    _delay(lead_ms)
    turns = [turn(lead_ms - gpu_ms) for _ in range(repeats)]
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in marks)
        for name, marks in zip(runs, zip(*turns, strict=True), strict=True)
    }


def measure(forward: Callable[[], Tensor], d_out: Tensor) -> Measured:
    """Time and memory of a forward and backward over all leaves that ``forward`` reaches.

    GPU times: one loop gives forward, backward and both, each between its own events, with ``.grad`` None before each
    backward, as after an optimizer's ``zero_grad()``, so a gradient is adopted and not added. ``step_accumulate_ms`` is
    of a second loop, where ``.grad`` is there already. The host is ahead all the time: the GPU starts each loop late,
    and a step that it does faster than the host enqueues it is preceded by a delay on the GPU that makes up for that.
    A delay ends before the step's first event, so it is in no figure; where the GPU is the slower one there is none,
    and steps follow each other without a gap. Only a step that itself waits for the GPU has its launches in its time.

    ``host_ms`` is the host's time from the first call of a step to the return of its last, without any delay, from
    an idle GPU. Where it exceeds ``step_ms``, a loop of nothing but such steps is as slow as ``host_ms``.

    Memory: with ``.grad`` there already, so that a weight gradient that is then added counts in the peak.
    """
    out = forward()  # compiles what is compiled at first use
    leaves = leaves_of(out)
    out.backward(d_out)
    del out

    def step(delay_ms: float = 0) -> tuple[torch.cuda.Event, ...]:
        _delay(delay_ms)
        start = _mark()
        out = forward()
        middle = _mark()
        out.backward(d_out)
        return start, middle, _mark()

    def fresh_step(delay_ms: float = 0) -> tuple[torch.cuda.Event, ...]:
        for leaf in leaves:
            leaf.grad = None
        return step(delay_ms)

    for _ in range(WARM_UPS):
        fresh_step()
    host_ms = statistics.median(_host_ms(fresh_step) for _ in range(_FEWEST))
    lead_ms = _MARGIN * host_ms
    torch.cuda.synchronize()
    start, _, end = fresh_step(lead_ms)
    torch.cuda.synchronize()
    gpu_ms = start.elapsed_time(end)
    repeats = max(_FEWEST, min(REPEATS, int(_LONG_MS / max(gpu_ms, 1e-3))))

    def medians(run: Callable[[float], tuple[torch.cuda.Event, ...]], warm_ups: int) -> list[float]:
        """Of forward, backward and step."""
        _delay(lead_ms)
        marks = [run(lead_ms - gpu_ms) for _ in range(warm_ups + repeats)][warm_ups:]
        torch.cuda.synchronize()
        return [
            statistics.median(mark[first].elapsed_time(mark[last]) for mark in marks)
            for first, last in ((0, 1), (1, 2), (0, 2))
        ]

    fresh, added = medians(fresh_step, 0), medians(step, WARM_UPS)  # the first that adds finds its memory
    held, peak = memory(forward, d_out)
    for leaf in leaves:
        leaf.grad = None
    return Measured(*fresh, added[2], held, peak, host_ms)


def host_us(run: Callable[[], object]) -> float:
    """Median time in which the host enqueues ``run``, in µs. Each finds an idle GPU, so none waits for a full queue."""
    return statistics.median([_host_ms(run) for _ in range(WARM_UPS + REPEATS)][WARM_UPS:]) * 1e3


def _host_ms(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def memory(forward: Callable[[], Tensor], d_out: Tensor) -> tuple[float, float]:
    """MiB held between forward and backward, and at the peak, beyond what is allocated now and the output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    before += out.numel() * out.element_size()
    held = torch.cuda.memory_allocated() - before
    out.backward(d_out)
    return held / MIB, (torch.cuda.max_memory_allocated() - before) / MIB


def leaves_of(out: Tensor) -> list[Tensor]:
    """The leaf tensors that a backward from ``out`` gives gradients to."""
    leaves, seen, todo = [], set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [below for below, _ in node.next_functions]
    return leaves


def capture(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """``run`` as a CUDA graph, and what it returned, after warm-ups on a side stream as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def capturable(run: Callable[[], object]) -> bool:
    """Does it never wait for the GPU? What does can't be captured, and trying leaves a broken capture behind."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True


def graph_us(runs: Sequence[Callable[[], object]]) -> float:
    """GPU time of one call, in µs: ``runs``, the same call on different inputs, in turn in a CUDA graph.

    Without a launch between them, calls of a few µs can be timed. Inputs that together exceed L2 (``cold_copies``) are
    cold when their turn comes; outputs reuse the graph's memory and may be warm. A call on inputs that alone exceed L2
    needs no rotation.
    """
    estimate = median_ms(runs[0], repeats=3)  # the host's launches included: an upper limit
    rounds = max(1, math.ceil(_GRAPH_MS / max(estimate, 1e-3) / len(runs)))

    def calls() -> None:
        for _ in range(rounds):
            for run in runs:
                run()

    graph, _ = capture(calls)
    return median_ms(graph.replay, repeats=_REPLAYS) * 1e3 / (rounds * len(runs))


def cold_copies(input_bytes: int, l2_bytes: int) -> int:
    """How many inputs of this size to rotate through so that each has left L2 when its turn comes again."""
    return max(1, math.ceil(2 * l2_bytes / input_bytes))


def wall_ms(contestants: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 7) -> dict[str, float]:
    """Time per call as a loop of calls sees it: launches included, one synchronisation at the end of the loop.

    Each contestant is a call on different inputs, taken in turn. Median over rounds; the contestants alternate, so that
    whatever disturbs the host disturbs all alike.
    """

    def loop(runs: Sequence[Callable[[], object]], calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(calls):
            runs[i % len(runs)]()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls * 1e3

    calls = {}
    for name, runs in contestants.items():
        for run in runs:  # each once: warm
            run()
        calls[name] = max(len(runs), int(10 / loop(runs, len(runs))))  # 10 ms
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, runs in contestants.items():
            times[name].append(loop(runs, calls[name]))
    return {name: statistics.median(each) for name, each in times.items()}
