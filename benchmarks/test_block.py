"""The MoE block of Qwen3 and its experts alone, forward and backward, beside stock: block.json."""

import pytest

from moe_kernels.bench import block
from moe_kernels.bench.shapes import DEFAULT_SHAPES, ROUTINGS, SHAPES

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    cases = []
    for name in metafunc.config.getoption("shape") or DEFAULT_SHAPES:
        for case, reason in block.left_out(SHAPES[name]):
            cases.append(pytest.param(case, id=case.name, marks=pytest.mark.skip(reason=reason)))
        # Skewed routings cost as much as uniform ones: one shape shows what they do.
        routings = ROUTINGS if name == DEFAULT_SHAPES[0] else ROUTINGS[:1]
        cases += [pytest.param(case, id=case.name) for case in block.cases(SHAPES[name], routings)]
    metafunc.parametrize("case", cases)


def test_block(session, timed, case):
    timed(*block.run(session, case))
