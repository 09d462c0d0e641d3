"""Each op of the library on each backend that has it, and the routers: ops.json.

The products over the rows of experts have a test for both backends, which are timed in turn; ``--all-shapes``: on every
shape that they are measured on, about 1 s each beside what Triton compiles.
"""

import pytest

from benchmarks.conftest import LAYERS, shapes_of
from moe_kernels.bench import ops, router
from moe_kernels.bench.shapes import DEFAULT_SHAPES, ROW_SHAPES

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    config = metafunc.config
    if metafunc.function is test_router:
        asked = config.getoption("shape")
        cases = [case for case in router.cases() if not asked or case[0].name in asked]
        metafunc.parametrize("of, op, backend", cases, ids=[f"{op}-{r.name}-{backend}" for r, op, backend in cases])
    elif metafunc.function is test_row_product:
        default = ROW_SHAPES if config.getoption("all_shapes") else DEFAULT_SHAPES[:1]
        cases = [(shape, op) for shape in shapes_of(config, default, LAYERS) for op in ops.ROW_PRODUCTS]
        metafunc.parametrize("shape, op", cases, ids=[f"{op}-{shape.name}" for shape, op in cases])
    else:
        cases = [(shape, *case) for shape in shapes_of(config, DEFAULT_SHAPES[:1]) for case in ops.cases()]
        metafunc.parametrize("shape, op, backend", cases, ids=[f"{op}-{s.name}-{backend}" for s, op, backend in cases])


@pytest.fixture(scope="module")
def room(session):
    """The memory of other benchmarks' layers, and back what the ops have kept."""
    session.release()
    yield
    ops.forget()
    session.release()


def test_op(session, room, timed, shape, op, backend):
    if (reason := ops.why_not(session, shape, op, backend)) is not None:
        pytest.skip(reason)
    timed(*ops.run(session, shape, op, backend))


def test_row_product(session, room, timed, shape, op):
    timed(*ops.run_in_turn(session, shape, op))


def test_router(session, timed, of, op, backend):
    if (reason := router.why_not(session, of, op, backend)) is not None:
        pytest.skip(reason)
    timed(*router.run(session, of, op, backend))
