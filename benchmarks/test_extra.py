"""The block under autocast, in a CUDA graph and compiled: extra.json."""

import pytest

from moe_kernels.bench import extra
from moe_kernels.bench.shapes import SHAPES

pytestmark = pytest.mark.gpu

SHAPE = SHAPES["qwen3-30b"]


@pytest.mark.parametrize("implementation", ["grouped_mm", "moe_kernels"])
def test_autocast(session, timed, implementation):
    timed(*extra.run_autocast(session, SHAPE, implementation))


def test_graph(session, timed):
    timed(*extra.run_graph(session, SHAPE))


def test_compile(session, timed):
    timed(*extra.run_compile(session, SHAPE))
