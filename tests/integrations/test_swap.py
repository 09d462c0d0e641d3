"""Routers and blocks of whole models: when they become ours, and that nothing else about the model changes."""

import copy

import pytest
import torch
import transformers
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_kernels
from moe_kernels.integrations.transformers import families
from tests.integrations.models import FAMILIES, assert_same, loss_and_gradients, make_config, make_model, tokens

#: family -> blocks that fuse
BLOCKS = {"deepseek_v3": 2, "glm_moe_dsa": 2, "glm4_moe": 2, "qwen3_5_moe": 4, "nemotron_h": 2, "nemotron_h_latent": 2}


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


# Guards of the router; those of the block: test_blocks.py


@pytest.mark.parametrize("family", ["mixtral", "minimax"])
def test_jitter_stays(family, enabled, op_counter):
    """Noise that the stock block multiplies the tokens by in training comes before our router and experts."""
    options = {"router_jitter_noise": 0.3} if family == "mixtral" else {"router_jitter_noise": 0.3, "head_dim": 16}
    config_class = {"mixtral": transformers.MixtralConfig, "minimax": transformers.MiniMaxConfig}[family]
    model = AutoModelForCausalLM.from_config(config_class(**{**FAMILIES["mixtral"][1], **options}))
    report = moe_kernels.report(model)
    assert all(row.accelerated for row in (*report.layers, *report.routers)) and report.blocks == ()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(loss_and_gradients(model))
    assert_same(losses[1], losses[0])
    assert losses[2][0] != losses[0][0], "no noise"
    families.restore(model)
    model.set_experts_implementation("eager")
    torch.manual_seed(0)
    assert_same(losses[0], loss_and_gradients(model))


def test_a_sharded_router_runs_stock(enabled, op_counter, tmp_path):
    """Tensor parallelism may shard or replicate its weight: a DTensor, which our ops know nothing of."""
    gate = make_model("qwen3_moe").model.layers[0].mlp.gate
    x = torch.randn(6, 64)
    expected = gate(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        gate.weight = torch.nn.Parameter(distribute_tensor(gate.weight.detach(), mesh))
        with op_counter:
            actual = gate(distribute_tensor(x, mesh))
    finally:
        torch.distributed.destroy_process_group()
    assert not op_counter.calls
    torch.testing.assert_close(actual[1].full_tensor(), expected[1])


def test_hooks_of_the_router_see_and_change_what_stock_gives(enabled, op_counter):
    model = make_model("deepseek_v3")
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0], out[1] * 0.5, out[2]))
    assert runs(model, op_counter) == 2
    actual = loss_and_gradients(model)
    families.restore(model)
    model.set_experts_implementation("eager")
    assert_same(actual, loss_and_gradients(model))


def test_an_adapter_on_the_routers_weight(enabled):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.gate.weight"])
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model("deepseek_v3"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    actual = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual[1] and all("lora" in name for name in actual[1])
    model.zero_grad()
    families.restore(model)
    model.base_model.model.set_experts_implementation("eager")
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss.detach(), actual[0])


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
