"""A training step of a 4-layer model; the first step of a fresh process, of that model and of one layer: model.json."""

import pytest

from moe_kernels.bench import first_layer, model, peers

pytestmark = [pytest.mark.gpu, pytest.mark.main_shape]


@pytest.mark.parametrize("what", ["steps", "first-step"])
def test_model(session, what):
    if what == "first-step" and (reason := peers.available()["liger"]) is not None:
        pytest.skip(f"liger: {reason}")
    _record(session, model.measured, what)


@pytest.mark.parametrize("what", first_layer.WHAT)
def test_first_layer(session, what):
    _record(session, first_layer.measured, what)


def _record(session, measured, what):
    session.release()  # the other process needs the memory
    rows = measured(what)
    if "reason" in rows:
        pytest.fail(rows["reason"])
    for name, row in rows.items():
        session.record(model.FILE, name, row)
