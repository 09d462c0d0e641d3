"""The clocks, on a clock that the test moves."""

import itertools
import types

import pytest
import torch

from moe_kernels.bench import ceilings, measure
from moe_kernels.bench.measure import MIB
from moe_kernels.bench.shapes import Shape


class Layer(torch.autograd.Function):
    """Two ms forward, five backward, one more for each gradient that is added to another."""

    @staticmethod
    def forward(ctx, x, w, clock, leaves, seen):
        ctx.clock, ctx.leaves, ctx.seen = clock, leaves, seen
        clock.now += 2
        return x * 1.0

    @staticmethod
    def backward(ctx, d):
        present = [leaf.grad is not None for leaf in ctx.leaves]
        ctx.seen.append(present)
        ctx.clock.now += 5 + sum(present)
        return d, torch.ones(2), None, None, None


@pytest.fixture
def layer(clock):
    x, w = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []
    return (lambda: Layer.apply(x, w, clock, (x, w), seen)), (x, w), seen


def test_steps_are_timed_with_and_without_gradients_to_add_to(layer):
    forward, leaves, seen = layer
    found = measure.measure(forward, torch.ones(3))
    assert found[:4] == (2, 5, 7, 9)
    fresh = seen.count([False, False])
    # the first compiles; a few tell the host's time, one the GPU's
    assert fresh == 1 + measure.WARM_UPS + measure._FEWEST + 1 + measure.REPEATS
    assert seen[:fresh] == [[False, False]] * fresh and all(seen[-1]), "memory is measured with gradients allocated"
    assert seen.count([True, True]) == measure.WARM_UPS + measure.REPEATS + 1
    assert all(leaf.grad is None for leaf in leaves)


def test_long_steps_are_repeated_less(clock):
    x = torch.ones(3, requires_grad=True)
    steps = []

    def forward():
        steps.append(None)
        clock.now += 100
        return x * 1.0

    assert measure.measure(forward, torch.ones(3)).step_ms == 100
    assert len(steps) < 30


@pytest.fixture
def queue(clock, monkeypatch):
    """A host and the GPU that works off what it enqueues, each on a time of its own, in ms."""
    queue = types.SimpleNamespace(host=0.0, gpu=0.0, slept=0.0)

    def enqueue(host_ms, gpu_ms):
        queue.host += host_ms
        queue.gpu = max(queue.gpu, queue.host) + gpu_ms

    def record(event):
        enqueue(0, 0)
        event.time = queue.gpu

    def sleep(cycles):
        queue.slept += cycles / measure._CYCLES_PER_MS
        enqueue(0, cycles / measure._CYCLES_PER_MS)

    queue.enqueue = enqueue
    queue.wait = lambda: setattr(queue, "host", max(queue.host, queue.gpu))
    monkeypatch.setattr(torch.cuda.Event, "record", record)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.wait)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: queue.host / 1e3)
    return queue


class Launches(torch.autograd.Function):
    """Kernels that take the host and the GPU some ms each, forward and, twice as long, backward."""

    @staticmethod
    def forward(ctx, x, queue, host_ms, gpu_ms, waits):
        ctx.rest = queue, host_ms, gpu_ms
        for _ in range(4):
            queue.enqueue(host_ms / 4, gpu_ms / 4)
            if waits:
                queue.wait()
        return x * 1.0

    @staticmethod
    def backward(ctx, d):
        queue, host_ms, gpu_ms = ctx.rest
        for _ in range(8):
            queue.enqueue(host_ms / 4, gpu_ms / 4)
        return d, None, None, None, None


@pytest.mark.parametrize("host_ms, gpu_ms", [(1.0, 4.0), (2.0, 1.5), (2.0, 0.2)], ids=["gpu", "near", "host"])
def test_the_host_is_in_no_time_of_the_gpu(queue, host_ms, gpu_ms):
    x = torch.ones(3, requires_grad=True)
    found = measure.measure(lambda: Launches.apply(x, queue, host_ms, gpu_ms, False), torch.ones(3))
    assert found[:4] == pytest.approx((gpu_ms, 2 * gpu_ms, 3 * gpu_ms, 3 * gpu_ms))
    assert found.host_ms == pytest.approx(3 * host_ms)
    if gpu_ms > host_ms:
        assert queue.slept <= 3 * measure._MARGIN * 3 * host_ms, "at the start of each loop only: no gaps between steps"


def test_the_hosts_time_is_without_the_gpus(queue):
    assert measure.host_us(lambda: queue.enqueue(0.2, 5.0)) == pytest.approx(200)
    assert queue.slept == 0


def test_a_delay_is_in_no_time_even_of_a_step_that_waits(queue):
    x = torch.ones(3, requires_grad=True)
    found = measure.measure(lambda: Launches.apply(x, queue, 0.1, 0.1, True), torch.ones(3))
    assert queue.slept > 0
    assert found.step_ms < 0.3 + 0.3 + 0.01, "its launches count, the delay does not"


def test_parts_in_turn_are_timed_without_their_launches(queue):
    order = []
    runs = {name: lambda name=name: (order.append(name), queue.enqueue(0.05, 0.01)) for name in "ab"}
    found = measure.medians_in_turn_ms(runs, repeats=2, prepare=lambda: order.append("-"))
    assert found == pytest.approx({"a": 0.01, "b": 0.01})
    assert "".join(order) == "-ab" * (measure.WARM_UPS + 1 + 2)


@pytest.mark.parametrize("host_ms", [0.5, 3.0])
def test_parts_in_turn_stay_behind_a_slow_host(queue, host_ms):
    runs = {name: lambda ms=ms: queue.enqueue(host_ms, ms) for name, ms in (("a", 1.0), ("b", 2.0))}
    assert measure.medians_in_turn_ms(runs, repeats=200) == pytest.approx({"a": 1.0, "b": 2.0})


def test_memory_leaves_out_what_was_there_and_the_output(monkeypatch, layer):
    forward, _, _ = layer
    allocated = itertools.chain([100 * MIB], [100 * MIB + 7 * MIB + 3 * 4])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 * MIB + 20 * MIB + 3 * 4)
    assert measure.memory(forward, torch.ones(3)) == (7, 20)


def test_leaves_are_found_through_the_graph():
    x, frozen, w, unused = (torch.ones(2, requires_grad=flag) for flag in (True, False, True, True))
    found = measure.leaves_of((x * frozen + w) * x)
    assert {id(leaf) for leaf in found} == {id(x), id(w)}
    assert len(found) == 2 and unused.grad is None


def test_median_leaves_out_warm_ups_and_preparation(clock):
    costs = iter([50, 50, 50, 1, 3, 2, 9, 1])

    def prepare():
        clock.now += 1000

    def run():
        clock.now += next(costs)

    assert measure.median_ms(run, repeats=5, prepare=prepare) == 2


def test_graph_time_is_shared_by_the_calls_in_it(clock, monkeypatch):
    calls = []

    def capture(run):
        calls.clear()
        run()
        return type("Graph", (), {"replay": lambda self: setattr(clock, "now", clock.now + 0.5 * len(inside))})(), None

    runs = [lambda name=name: (calls.append(name), setattr(clock, "now", clock.now + 1)) for name in "abc"]
    inside = calls
    monkeypatch.setattr(measure, "capture", capture)
    assert measure.graph_us(runs) == pytest.approx(500)
    assert calls == list("abcabc"), "all inputs take turns, for at least 4 ms by the first estimate"


@pytest.mark.parametrize("size, copies", [(2**20, 100), (100 * 2**20, 1), (60 * 2**20, 2), (2**30, 1)])
def test_copies_that_leave_l2(size, copies):
    assert measure.cold_copies(size, 50 * 2**20) == copies


def test_contestants_alternate(clock, monkeypatch):
    order = []
    now = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))  # a second passes in every loop
    found = measure.wall_ms({name: [lambda name=name: order.append(name)] for name in "ab"}, rounds=3)
    assert found == {"a": 1000, "b": 1000}
    assert "".join(order) == "aabb" + "ab" * 3


# The bound


def test_padding_is_to_whole_blocks():
    assert ceilings.padding(torch.tensor([64, 64])) == 1
    assert ceilings.padding(torch.tensor([1, 127, 0])) == (64 + 128) / 128


def test_bound_is_products_times_padding_and_the_bytes_of_the_sums():
    shape = Shape("small", 100, 10, 5, 4, 2)
    products = {"up": 1.0, "down": 2.0, "d_a": 4.0, "dx": 8.0, "dw_gate_up": 16.0, "dw_down": 32.0}
    found = ceilings.bound(shape, products, 1.5, bytes_per_second=1e6)
    combine = 2 * (200 + 100) * 10 / 1e6 * 1e3
    assert found["combine_ms"] == combine and found["padding"] == 1.5 and found["d_a_ms"] == 4
    assert found["forward_ms"] == pytest.approx(3 * 1.5 + combine)
    assert found["step_ms"] == pytest.approx(63 * 1.5 + 2 * combine)


def test_products_have_the_sizes_of_the_layer():
    shape = Shape("small", 64, 10, 6, 4, 2)
    runs = ceilings.products(shape, device="cpu")
    assert tuple(runs) == ceilings.PRODUCTS
    sizes = [tuple(run().shape) for run in runs.values()]
    # per expert 32 rows: rows x width, or the weight's own shape for its gradient
    assert sizes == [(4, 32, 12), (4, 32, 10), (4, 32, 6), (4, 32, 10), (4, 12, 10), (4, 10, 6)]
