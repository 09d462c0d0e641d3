"""Each op of the library on each backend that has it, and the routers: ops.json."""

import pytest

from moe_kernels.bench import ops, router
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    shapes = metafunc.config.getoption("shape")
    if metafunc.function is test_router:
        cases = [case for case in router.cases() if not shapes or case[0].name in shapes]
        metafunc.parametrize("of, op, backend", cases, ids=[f"{op}-{r.name}-{backend}" for r, op, backend in cases])
        return
    shapes = [SHAPES[name] for name in shapes or DEFAULT_SHAPES[:1]]
    cases = [(shape, *case) for shape in shapes for case in ops.cases()]
    metafunc.parametrize("shape, op, backend", cases, ids=[f"{op}-{s.name}-{backend}" for s, op, backend in cases])


def test_op(session, timed, shape, op, backend):
    if (reason := ops.why_not(session, shape, op, backend)) is not None:
        pytest.skip(reason)
    timed(*ops.run(session, shape, op, backend))


def test_router(session, timed, of, op, backend):
    if (reason := router.why_not(session, of, op, backend)) is not None:
        pytest.skip(reason)
    timed(*router.run(session, of, op, backend))
