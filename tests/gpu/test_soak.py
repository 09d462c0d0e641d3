"""Random problems, in chunks: a few in an ordinary run, a soak when asked for.

pytest tests/gpu/test_soak.py -m soak --soak 2000 -n 14 --save
pytest tests/gpu/test_soak.py --soak-case hopper-1234
"""

import pytest
import torch

from tests.gpu import soak

pytestmark = [pytest.mark.gpu, pytest.mark.soak]


def pytest_generate_tests(metafunc):
    config = metafunc.config
    if named := config.getoption("soak_case", None):
        cases = [(kind, range(int(number), int(number) + 1)) for kind, number in (n.rsplit("-", 1) for n in named)]
    else:
        cases = [chunk for kind in soak.KINDS for chunk in soak.chunks(kind, config.getoption("soak", soak.FEW))]
    metafunc.parametrize("kind,numbers", cases, ids=[f"{kind}-{n[0]}-to-{n[-1]}" for kind, n in cases])


@pytest.fixture
def one_thread():
    """Of torch on the host, where each worker would take as many as there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_random_problems(kind, numbers, poison, one_thread, record_property):
    if (reason := soak.why_not(kind)) is not None:
        pytest.skip(reason)
    outcome = soak.run(kind, numbers)
    record_property("soak", outcome._asdict())
    assert not outcome.failures, "\n".join(outcome.failures)
