"""Fixtures of the Hugging Face tests: moe_kernels switched on and off around each test, and a count of our ops."""

import importlib.util

import pytest
import torch

import moe_kernels

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def enabled():
    moe_kernels.enable()
    yield
    moe_kernels.disable()


@pytest.fixture
def ours(op_counter):
    """``with ours(layers, backward=True): ...`` fails unless exactly that many experts layers ran on our ops."""

    class Ours:
        def __init__(self, layers: int, backward: bool = False):
            self.layers, self.backward = layers, backward

        def __enter__(self):
            op_counter.calls.clear()
            return op_counter.__enter__()

        def __exit__(self, error, *rest):
            op_counter.__exit__(error, *rest)
            if error is not None:
                return
            for op in ("routing_plan", "gate_up"):
                assert op_counter.calls[op] == self.layers, f"{op}: {dict(op_counter.calls)}"
            if self.backward:
                assert op_counter.calls["d_activation_"] == self.layers, dict(op_counter.calls)
                # A third sums the rows for the bias of a transposed weight.
                assert op_counter.calls["grouped_wgrad"] in (2 * self.layers, 3 * self.layers), dict(op_counter.calls)

    return Ours


@pytest.fixture
def residuals(op_counter, monkeypatch):
    """How many calls of ``combine`` got a residual: one per fused block and forward."""
    from tests.integrations.models import tokens  # needs Transformers

    seen = []
    dispatch = type(op_counter).__torch_dispatch__

    def spy(self, function, types, args=(), kwargs=None):
        if "combine" in str(function):
            seen.append(args[4] is not None)
        return dispatch(self, function, types, args, kwargs)

    monkeypatch.setattr(type(op_counter), "__torch_dispatch__", spy)

    def count(model, **options):
        seen.clear()
        with op_counter:
            model(tokens(), use_cache=False, **options)
        return sum(seen)

    return count
