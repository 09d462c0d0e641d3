"""The block under autocast, in a CUDA graph, compiled and on the host: extra.json."""

import pytest

from moe_kernels.bench import extra
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES

pytestmark = [pytest.mark.gpu, pytest.mark.main_shape]

SHAPE = SHAPES[DEFAULT_SHAPES[0]]


@pytest.mark.parametrize("implementation", ["grouped_mm", "moe_kernels"])
def test_autocast(session, timed, implementation):
    timed(*extra.run_autocast(session, SHAPE, implementation))


def test_graph(session, timed):
    timed(*extra.run_graph(session, SHAPE))


def test_compile(session, timed):
    timed(*extra.run_compile(session, SHAPE))


@pytest.mark.parametrize("implementation", extra.ON_THE_HOST)
def test_host(session, timed, implementation):
    timed(*extra.run_host(session, SHAPE, implementation))


def test_compile_accumulate(session, timed):
    timed(*extra.run_compile_accumulate(session, SHAPE))
