"""Whole tiny models of each family: loss and every gradient against stock, fp32."""

import pytest
from torch import nn

import moe_kernels
from tests.integrations.models import ACCELERATED, FAMILIES, assert_same, loss_and_gradients, make_model

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize("family", ACCELERATED)
def test_equals_stock(family, ours):
    model = make_model(family)
    layers = FAMILIES[family][2]
    assert moe_kernels.report(model).accelerated == layers
    with ours(layers, backward=True):
        actual = loss_and_gradients(model)
    for stock in ("grouped_mm", "eager"):
        model.set_experts_implementation(stock)
        with ours(0):
            expected = loss_and_gradients(model)
        assert_same(actual, expected)


def test_what_we_lack_stays_stock(ours):
    model = make_model("mixtral")
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.ReLU()
    (first, second) = moe_kernels.report(model).layers
    assert first.implementation == "moe_kernels" and first.backend == "stock" and not first.accelerated
    assert "gated activation ReLU" in first.reason and second.reason == first.reason
    with ours(0):
        actual = loss_and_gradients(model)
    model.set_experts_implementation("grouped_mm")
    assert_same(actual, loss_and_gradients(model))
