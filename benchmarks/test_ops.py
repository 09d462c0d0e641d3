"""Each op of the library on each backend that has it: ops.json."""

import pytest

from moe_kernels.bench import ops
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    shapes = [SHAPES[name] for name in metafunc.config.getoption("shape") or DEFAULT_SHAPES[:1]]
    cases = [(shape, *case) for shape in shapes for case in ops.cases()]
    metafunc.parametrize("shape, op, backend", cases, ids=[f"{op}-{s.name}-{backend}" for s, op, backend in cases])


def test_op(session, timed, shape, op, backend):
    if (reason := ops.why_not(session, shape, op, backend)) is not None:
        pytest.skip(reason)
    timed(*ops.run(session, shape, op, backend))
