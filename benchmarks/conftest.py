"""What the benchmarks share: one measuring session, whose rows are saved at the end, and the options.

    pytest benchmarks                            everything, one GPU, about two minutes
    pytest benchmarks/test_ops.py --shape NAME   other shapes; may be given more than once
    pytest benchmarks --peers                    third-party kernels too, if they can be imported

Rows go to ``benchmarks/results/<gpu>/``; a run of some tests replaces their rows and leaves the others.
"""

import pytest
import torch

from moe_kernels.bench.results import results_dir
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import SHAPES


def pytest_addoption(parser):
    group = parser.getgroup("moe_kernels")
    group.addoption("--shape", action="append", choices=SHAPES, help="layer shape; may be given more than once")
    group.addoption("--peers", action="store_true", help="measure third-party kernels too")


def pytest_ignore_collect(collection_path, config):
    if collection_path.name == "test_peers.py" and not config.getoption("peers"):
        return True
    return None


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def session():
    """Keep a row by ``session.record(file, name, row)``; it is saved even if a later benchmark fails."""
    session = Session()
    yield session
    session.save(results_dir())


@pytest.fixture
def timed(benchmark):
    """Show a row beside the host's clock: ``timed(run, row)``. ``run`` waits for the GPU."""

    def show(run, row: dict) -> None:
        benchmark.extra_info.update(row)
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)

    return show
