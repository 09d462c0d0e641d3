"""Bad checkpoints, configs and weights: nothing trains on random numbers, and nothing falls back in silence."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

import moe_kernels
from moe_kernels.cli import worker
from moe_kernels.integrations.transformers import blocks, families
from moe_kernels.integrations.transformers.registry import FP8_REASON
from tests.integrations.models import make_config, make_model, tokens

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("enabled")

EXPERTS = re.compile(r"\.experts\.\d+\.")


def first(weights: dict, words: str = "down_proj") -> str:
    return next(name for name in sorted(weights) if EXPERTS.search(name) and words in name)


def one_expert_missing(weights):
    del weights[first(weights)]


def all_experts_missing(weights):
    for name in [name for name in weights if EXPERTS.search(name)]:
        del weights[name]


def one_expert_too_many(weights):
    weights[first(weights).replace("experts.0.", "experts.8.")] = weights[first(weights)].clone()


def one_expert_misshapen(weights):
    weights[first(weights)] = weights[first(weights)][:-1].contiguous()


def all_experts_misshapen(weights):
    for name in [name for name in weights if EXPERTS.search(name)]:
        weights[name] = weights[name][:-1].contiguous()


BROKEN = [
    one_expert_missing,
    all_experts_missing,
    one_expert_too_many,
    one_expert_misshapen,
    all_experts_misshapen,
]


@pytest.fixture
def saved(tmp_path):
    """saved(family, change) -> a checkpoint with per-expert weights, changed."""

    def save(family: str, change) -> Path:
        make_model(family).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = safetensors.load_file(file)
        change(weights)
        safetensors.save_file(weights, file, metadata={"format": "pt"})
        return tmp_path

    return save


@pytest.mark.parametrize("change", BROKEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_finetune_refuses_and_names_the_weight(family, change, saved):
    path = saved(family, change)
    model, refusal = worker.load(str(path))
    assert model is None and "\n" not in refusal and str(path) in refusal
    assert re.search(r"model\.layers\.\d\.(mlp|mixer)\.experts\.down_proj", refusal), refusal


def test_finetune_takes_a_whole_checkpoint(saved, capfd):
    model, refusal = worker.load(str(saved("qwen3_moe", lambda weights: None)))
    assert refusal is None and moe_kernels.report(model).accelerated == 2
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_unwritten_weights(saved):
    """A file that is shorter than its header says, and a shard that the index names but that is not there."""
    path = saved("qwen3_moe", lambda weights: None)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"can't load {path}" in worker.load(str(path))[1]
    (path / "model.safetensors").write_bytes(whole)
    names = safetensors.load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + ('experts' in name)}-of-00002.safetensors" for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert "model-00002-of-00002.safetensors" in worker.load(str(path))[1]


@pytest.mark.parametrize("change", BROKEN, ids=lambda f: f.__name__)
def test_from_pretrained_is_as_loud_as_without_us(change, saved, caplog):
    """Transformers loads: it raises, or where a whole stack is missing it warns; ours must not silence either."""
    path = saved("qwen3_moe", change)
    said = []
    with worker.listening(said):
        try:
            _, loaded = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        except RuntimeError:
            loaded = None
    assert (loaded is None) == (change is not all_experts_missing)
    assert "model.layers" in said[-1] and ".mlp.experts.down_proj" in said[-1]
    if loaded is not None:
        assert "model.layers.0.mlp.experts.down_proj" in loaded["missing_keys"]


# A config that asks for what nobody knows, or what we lack


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_an_activation_that_we_lack_stays_stock_and_is_reported(family, op_counter):
    config = make_config(family)
    name = "mlp_hidden_act" if family == "nemotron_h" else "hidden_act"
    setattr(config, name, "quick_gelu")
    model = AutoModelForCausalLM.from_config(config)
    report = moe_kernels.report(model)
    assert all("QuickGELUActivation" in row.reason and not row.accelerated for row in report.layers)
    assert all(row.reason == "its experts run on stock" for row in report.blocks)
    assert all(row.accelerated for row in report.routers)
    with op_counter, torch.no_grad():
        model(tokens(), use_cache=False)
    assert op_counter.calls["topk_route"] == len(report.routers) and not op_counter.calls["gate_up"]


def test_an_unknown_activation_is_an_error():
    config = make_config("qwen3_moe")
    config.hidden_act = "swosh"
    with pytest.raises(KeyError, match="swosh"):
        AutoModelForCausalLM.from_config(config)


def scoring_block(scoring: str) -> torch.nn.Module:
    """A block whose router reads its scoring from the config."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
    config = transformers.DeepseekV4Config(scoring_func=scoring, **sizes)
    config._experts_implementation = "moe_kernels"
    block = DeepseekV4SparseMoeBlock(config, layer_idx=config.num_hidden_layers - 1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.1)
    families.swap(block)
    return block


def test_a_scoring_that_we_lack_stays_stock_and_is_reported(op_counter):
    for scoring, reason in (("tanh", "there is no scoring 'Tanh'"), ("sqrtsoftplus", "")):
        block = scoring_block(scoring)
        (row,) = moe_kernels.report(block).routers
        assert row.accelerated == (not reason) and row.reason == reason
        op_counter.calls.clear()
        with op_counter, torch.no_grad():
            block(torch.randn(1, 3, 64))
        assert op_counter.calls["topk_route"] == (not reason)


def test_an_unknown_scoring_is_an_error():
    with pytest.raises(KeyError, match="swosh"):
        scoring_block("swosh")


# Quantised experts


@pytest.mark.parametrize("family", ["deepseek_v3", "glm_moe_dsa"])
def test_fp8_experts_stay_stock_and_are_reported(family):
    """As Transformers' own quantiser makes them."""
    model = make_model(family)
    replace_with_fp8_linear(model, quantization_config=transformers.FineGrainedFP8Config(weight_block_size=(8, 8)))
    report = moe_kernels.report(model)
    assert len(report.layers) == len(report.blocks) == len(report.routers) == 2
    for row in (*report.layers, *report.blocks):
        assert row.backend == "stock" and not row.accelerated and row.reason == FP8_REASON
    assert all(row.accelerated for row in report.routers)
    for part in families.parts(model):
        assert part.kind == "router" or blocks.why_not_now(part.module) == FP8_REASON


def test_integer_weights_stay_stock_and_are_reported():
    model = make_model("deepseek_v3")
    for part in families.parts(model):
        for name, parameter in list(part.experts.named_parameters()):
            setattr(part.experts, name, torch.nn.Parameter(parameter.to(torch.int8), requires_grad=False))
    report = moe_kernels.report(model)
    assert all("quantised or not floating-point (int8)" in row.reason for row in report.layers)
    assert all(row.reason == "its experts run on stock" for row in report.blocks)
