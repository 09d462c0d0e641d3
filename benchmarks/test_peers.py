"""The same blocks by third-party kernels, unless --no-peers is given: block.json.

Each runs in a process of its own, where it may take minutes to tune itself: one shape, unless others are asked for.
"""

import pytest

from benchmarks.conftest import shapes_of
from moe_kernels.bench import block, peers
from moe_kernels.bench.results import results_dir
from moe_kernels.bench.shapes import DEFAULT_SHAPES

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    shapes = shapes_of(metafunc.config, DEFAULT_SHAPES[:1])
    metafunc.parametrize("shape", shapes, ids=[shape.name for shape in shapes])


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peer(session, pytestconfig, shape, peer):
    minutes = pytestconfig.getoption("peer_minutes")
    try:
        reason = block.run_peer(session, shape, peer, None if minutes is None else 60 * minutes)
    finally:
        session.save(results_dir())  # now: one that is killed later saves nothing
    if reason is not None:
        pytest.skip(reason)
