"""Routers and blocks of whole models: when they become ours, and that nothing else about the model changes."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_kernels
from moe_kernels.integrations.transformers import families
from tests.integrations.models import FAMILIES, assert_same, loss_and_gradients, make_config, make_model, tokens

#: family -> blocks that fuse
BLOCKS = {"deepseek_v3": 2, "glm_moe_dsa": 2, "glm4_moe": 2, "qwen3_5_moe": 4, "nemotron_h": 2}


@pytest.fixture
def disabled():
    moe_kernels.disable()
    yield
    moe_kernels.disable()


def ours(model) -> int:
    return sum(families.is_ours(module) for module in model.modules())


def runs(model, op_counter) -> int:
    """Routers that run on our op in one forward."""
    op_counter.calls.clear()
    with op_counter, torch.no_grad():
        model(tokens(), use_cache=False)
    return op_counter.calls["topk_route"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock(family, enabled, op_counter):
    model, layers = make_model(family), FAMILIES[family][2]
    assert ours(model) == layers + BLOCKS.get(family, 0)
    assert runs(model, op_counter) == layers
    actual = loss_and_gradients(model)
    families.restore(model)
    model.set_experts_implementation("eager")
    assert ours(model) == runs(model, op_counter) == 0
    assert_same(actual, loss_and_gradients(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, enabled, op_counter):
    model = make_model(family).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with op_counter:
        actual = model.generate(tokens(2, 8), **options)
    assert op_counter.calls["topk_route"] >= 3 * FAMILIES[family][2] and not op_counter.calls["topk_route_bwd"]
    families.restore(model)
    model.set_experts_implementation("eager")
    assert torch.equal(actual, model.generate(tokens(2, 8), **options))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5_moe", "minimax_m2"])
def test_save_and_load(family, enabled, tmp_path):
    model = make_model(family).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert ours(loaded) == ours(model) > 0
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    moe_kernels.disable()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert ours(stock) == 0 and stock.state_dict().keys() == loaded.state_dict().keys()
    torch.testing.assert_close(stock(tokens()).logits, loaded(tokens()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "minimax_m2"])
def test_gradient_checkpointing(family, reentrant, enabled, op_counter):
    model = make_model(family)
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with op_counter:
        assert_same(loss_and_gradients(model), expected)
    assert op_counter.calls["topk_route"] == 2 * FAMILIES[family][2]


# When


def test_enable_and_disable(disabled, op_counter):
    before = PreTrainedModel.post_init
    stock = make_model("deepseek_v3")
    moe_kernels.enable()
    moe_kernels.enable()
    assert PreTrainedModel.post_init is not before and PreTrainedModel.post_init.__wrapped__ is before
    model = make_model("deepseek_v3")
    assert ours(stock) == 0 and ours(model) == 4
    assert all("patch(model)" in row.reason for row in moe_kernels.report(stock).routers)
    moe_kernels.disable()
    assert PreTrainedModel.post_init is before
    assert runs(model, op_counter) == 0 and not op_counter.calls
    assert ours(make_model("deepseek_v3")) == 0
    assert all("disabled" in row.reason for row in moe_kernels.report(model).routers)
    moe_kernels.enable()
    assert runs(model, op_counter) == 2


def test_patch(disabled, op_counter):
    model = make_model("deepseek_v3")
    expected = loss_and_gradients(model)
    moe_kernels.patch(moe_kernels.patch(model))
    assert ours(model) == 4 and runs(model, op_counter) == 2
    report = moe_kernels.report(model)
    assert all(row.accelerated for row in (*report.layers, *report.routers, *report.blocks))
    assert_same(loss_and_gradients(model), expected)
    assert ours(make_model("deepseek_v3")) == 0, "patch is for one model"


def test_an_explicit_choice_is_respected_and_may_be_taken_back(enabled, op_counter):
    model = make_model("deepseek_v3", experts_implementation="eager")
    assert runs(model, op_counter) == 0 and not op_counter.calls
    assert all("'eager' was chosen" in row.reason for row in moe_kernels.report(model).routers)
    model.set_experts_implementation("moe_kernels")
    assert runs(model, op_counter) == 2
    clone = copy.deepcopy(model)
    clone.set_experts_implementation("grouped_mm")
    assert runs(clone, op_counter) == 0 and runs(model, op_counter) == 2, "each has a config of its own"


def test_a_forward_that_another_library_runs_already(disabled, op_counter):
    model = make_model("deepseek_v3")
    for layer in model.model.layers[1:]:
        layer.mlp.gate.forward = layer.mlp.gate.forward  # as tensor parallelism and accelerate do
    moe_kernels.patch(model)
    rows = moe_kernels.report(model).routers
    assert not any(row.accelerated for row in rows) and "another library runs its forward" in rows[0].reason
    assert runs(model, op_counter) == 0


def test_on_the_meta_device_and_in_sub_models(enabled):
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    text = {**make_config("qwen3_moe").to_dict(), "head_dim": 16}
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeForConditionalGeneration(
            transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
        )
    report = moe_kernels.report(model)
    assert ours(model) == len(report.routers) == len(report.layers) > 0


def test_a_dense_model_is_left_alone(enabled):
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assert ours(AutoModelForCausalLM.from_config(config)) == 0


def test_report_lists_all(enabled):
    report = moe_kernels.report(make_model("deepseek_v3"))
    text = str(report)
    assert "2 of 2 MoE layers accelerated, 2 of 2 routers, 2 of 2 blocks" in text
    for line in (
        "model.layers.1..2.mlp.gate (2)",
        "model.layers.1..2.mlp (2)",
        "DeepseekV3TopkRouter",
        "DeepseekV3MoE",
    ):
        assert line in text
    assert {row.kind for row in (*report.layers, *report.routers, *report.blocks)} == {"experts", "router", "block"}
