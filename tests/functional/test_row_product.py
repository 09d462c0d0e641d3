"""The column chunks of Y and dX: how many columns, and that they change no result."""

import contextlib

import pytest
import torch

from moe_kernels import use_backend
from moe_kernels.functional import _row_product
from tests.functional.experts import BOTH, gradients, inputs_of, run
from tests.helpers import Case, Problem, assert_close


@pytest.fixture(autouse=True)
def _reference():
    """What is tested here is what surrounds the ops."""
    with use_backend("reference"):
        yield


@pytest.mark.parametrize(
    ("rows", "width", "gate_up_elements", "columns"),
    [
        (131072, 2048, 128 * 1536 * 2048, 2048),  # qwen3-30b at T=16384: 512 MiB of rows beside 768 MiB of gradient
        (262144, 2048, 128 * 1536 * 2048, 1024),  # at T=32768: 1 GiB in two
        (2**20, 2048, 8 * 512 * 2048, 256),  # few small experts: 4 GiB of rows, down to the narrowest
        (1024, 2048, 8 * 512 * 2048, 2048),  # below the floor nothing is split
        (2**20, 1000, 8 * 16 * 1000, 256),
    ],
    ids=lambda value: str(value),
)
def test_columns_of_a_chunk(rows, width, gate_up_elements, columns):
    a = torch.empty(rows, 8, dtype=torch.bfloat16, device="meta")
    assert _row_product._chunk_columns(a, width, gate_up_elements) == columns


@BOTH
def test_column_chunks_give_the_same_result(recompute, monkeypatch, op_counter):
    p = Problem(Case(40, 2, 4, 72, 16, block_m=16))
    results = []
    for chunked in (False, True):
        if chunked:
            monkeypatch.setattr(_row_product, "_chunk_columns", lambda *_: 32)  # 72 = 32 + 32 + 8: a ragged last one
        inputs = inputs_of(p)
        with op_counter if chunked else contextlib.nullcontext():
            out = run(p, inputs, recompute)
            results.append([out, *gradients(out, inputs, p.d_out).values()])
    assert op_counter.calls["combine"] == 2 * 3, "forward and backward in three chunks each"
    for whole, chunked in zip(*results):
        assert_close(chunked, whole.double())
