"""The same blocks by third-party kernels, unless --no-peers is given: block.json.

Each runs in a process of its own, where it may take minutes to tune itself: one shape, unless others are asked for.
"""

import pytest

from moe_kernels.bench import block, peers
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", metafunc.config.getoption("shape") or DEFAULT_SHAPES[:1])


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peer(session, name, peer):
    if (reason := block.run_peer(session, SHAPES[name], peer)) is not None:
        pytest.skip(reason)
