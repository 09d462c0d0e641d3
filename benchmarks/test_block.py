"""The MoE block of Qwen3 and its experts alone, forward and backward, beside stock: block.json.

``--all-shapes``: the experts on every shape, on uniform routing: ours, and stock where it isn't measured by default,
about 4 s a shape.
"""

import pytest

from benchmarks.conftest import shapes_of
from moe_kernels.bench import block
from moe_kernels.bench.shapes import ALL_SHAPES, DEFAULT_SHAPES, ROUTINGS

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    what, config = metafunc.function.__name__.removeprefix("test_"), metafunc.config
    cases = []
    if what == "experts" and config.getoption("all_shapes"):
        shapes = shapes_of(config, ALL_SHAPES)
        cases = [pytest.param(case, id=case.name) for shape in shapes for case in block.on_every_shape(shape)]
    for shape in () if cases else shapes_of(config, DEFAULT_SHAPES):
        for case, reason in block.left_out(shape):
            cases.append(pytest.param(case, id=case.name, marks=pytest.mark.skip(reason=reason)))
        # Skewed routings cost as much as uniform ones: one shape shows what they do.
        routings = ROUTINGS if shape.name == DEFAULT_SHAPES[0] else ROUTINGS[:1]
        cases += [pytest.param(case, id=case.name) for case in block.cases(shape, routings)]
    metafunc.parametrize("case", [case for case in cases if case.values[0].what == what])


def test_block(session, timed, case):
    timed(*block.run(session, case))


def test_experts(session, timed, case):
    measured = block.run_if_it_fits(session, case)
    if isinstance(measured, str):
        pytest.skip(measured)
    timed(*measured)
