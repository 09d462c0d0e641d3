"""Few tokens, forward only, all implementations side by side: decode.json."""

import pytest

from moe_kernels.bench import decode
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES

pytestmark = [pytest.mark.gpu, pytest.mark.main_shape]


@pytest.mark.parametrize("tokens", decode.TOKENS, ids=lambda tokens: f"T{tokens}")
def test_decode(session, timed, tokens):
    timed(*decode.run(session, SHAPES[DEFAULT_SHAPES[0]], tokens))
