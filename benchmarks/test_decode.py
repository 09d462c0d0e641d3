"""Few tokens, forward only, all implementations side by side: decode.json."""

import pytest

from moe_kernels.bench import decode
from moe_kernels.bench.shapes import SHAPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", decode.TOKENS, ids=lambda tokens: f"T{tokens}")
def test_decode(session, timed, tokens):
    timed(*decode.run(session, SHAPES["qwen3-30b"], tokens))
