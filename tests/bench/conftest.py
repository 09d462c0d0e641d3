"""A GPU that isn't there: events on a clock that the test moves, and a measuring session on the CPU."""

import types

import pytest
import torch

from moe_kernels.bench.session import Session

PRODUCTS_MS = {"up": 1.0, "down": 0.5, "d_a": 0.5, "dx": 1.0, "dw_gate_up": 1.5, "dw_down": 0.75}


@pytest.fixture
def clock(monkeypatch):
    """``clock.now`` in ms is what events record; it moves when something adds to it."""
    clock = types.SimpleNamespace(now=0.0, slept=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock.now

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clock.slept.append(cycles))
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    return clock


@pytest.fixture
def session(clock, monkeypatch):
    monkeypatch.delenv("MOE_KERNELS_BACKEND", raising=False)
    session = Session("cpu")
    session.bytes_per_second = 3e12
    session.machine = {"gpu": {"name": "a GPU"}, "copy_tb_per_s": 3.0, "matmul_tflops": 750.0}
    return session
