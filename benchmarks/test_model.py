"""A training step of a 4-layer model, and the first step of a fresh process: model.json."""

import pytest

from moe_kernels.bench import model, peers

pytestmark = [pytest.mark.gpu, pytest.mark.main_shape]


@pytest.mark.parametrize("what", ["steps", "first-step"])
def test_model(session, what):
    if what == "first-step" and (reason := peers.available()["liger"]) is not None:
        pytest.skip(f"liger: {reason}")
    session.release()  # the other process needs the memory
    rows = model.measured(what)
    if "reason" in rows:
        pytest.fail(rows["reason"])
    for name, row in rows.items():
        session.record(model.FILE, name, row)
