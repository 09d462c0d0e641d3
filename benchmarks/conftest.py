"""What the benchmarks share: one measuring session, whose rows are saved at the end, and the options.

    pytest benchmarks                            everything, one GPU
    pytest benchmarks --no-peers                 without third-party kernels, which take minutes to tune themselves
    pytest benchmarks/test_ops.py --shape NAME   other shapes; may be given more than once
    pytest benchmarks --all-shapes               every shape: experts beside stock, and our row products
    pytest benchmarks/test_peers.py --peer-minutes 2   what a peer may take to tune itself, for each shape

Rows go to ``benchmarks/results/<gpu>/``; a run of some tests replaces their rows and leaves the others.
"""

import os
from collections.abc import Iterable, Mapping

# Inductor compiles one block here: its pool of compile processes costs more to start, and to end, than it saves.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

from moe_kernels.bench.results import results_dir
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import DEFAULT_SHAPES, OTHERS, SHAPES, Shape

LAYERS = SHAPES | OTHERS
#: Steps above this many ms are timed once on the host, others five times: it is a cross-check.
_LONG_MS = 25


def pytest_addoption(parser):
    group = parser.getgroup("moe_kernels")
    group.addoption("--shape", action="append", choices=LAYERS, help="layer shape; may be given more than once")
    group.addoption("--all-shapes", action="store_true", help="every shape: experts beside stock, our row products")
    group.addoption("--no-peers", action="store_true", help="leave third-party kernels out")
    group.addoption(
        "--peer-minutes",
        type=float,
        metavar="M",
        help="minutes that the first call of a third-party kernel may take on a shape; default: its own",
    )


def shapes_of(config, default: Iterable[str], table: Mapping[str, Shape] = SHAPES) -> list[Shape]:
    """The shapes that are asked for, of those that a benchmark can run on; by default others."""
    return [table[name] for name in config.getoption("shape") or default if name in table]


def pytest_configure(config):
    config.addinivalue_line("markers", f"main_shape: measured on {DEFAULT_SHAPES[0]} only")


def pytest_ignore_collect(collection_path, config):
    if collection_path.name == "test_peers.py" and config.getoption("no_peers"):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    shapes = config.getoption("shape")
    elsewhere = pytest.mark.skip(reason=f"measured on {DEFAULT_SHAPES[0]} only")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if shapes and DEFAULT_SHAPES[0] not in shapes and item.get_closest_marker("main_shape"):
            item.add_marker(elsewhere)
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def session():
    """Keep a row by ``session.record(file, name, row)``; it is saved even if a later benchmark fails."""
    session = Session()
    session.machine  # noqa: B018  measured now: a GPU that has crashed could not tell its ceilings
    yield session
    session.save(results_dir())


@pytest.fixture
def timed(benchmark):
    """Show a row beside the host's clock: ``timed(run, row)``. ``run`` waits for the GPU."""

    def show(run, row: dict) -> None:
        benchmark.extra_info.update(row)
        benchmark.pedantic(run, rounds=1 if row.get("step_ms", 0) > _LONG_MS else 5, warmup_rounds=1)

    return show
