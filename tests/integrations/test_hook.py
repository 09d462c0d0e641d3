"""enable, disable, patch and the names Transformers holds."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import moe_kernels
from moe_kernels.integrations.transformers import _version, is_enabled
from tests.integrations.models import assert_same, loss_and_gradients, make_config, make_model, tokens


def implementation(model) -> str:
    return model.config._experts_implementation


@pytest.fixture
def disabled():
    moe_kernels.disable()
    yield
    moe_kernels.disable()


def test_none_becomes_ours_and_a_choice_is_respected(enabled):
    assert implementation(make_model("qwen3_moe")) == "moe_kernels"
    for choice in ("eager", "grouped_mm", "batched_mm", "moe_kernels"):
        assert implementation(make_model("qwen3_moe", experts_implementation=choice)) == choice


def test_direct_constructor_and_dense_model(enabled):
    assert implementation(transformers.MixtralForCausalLM(make_config("mixtral"))) == "moe_kernels"
    dense = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(dense)
    assert implementation(model) != "moe_kernels"
    assert moe_kernels.report(model).layers == () and "no MoE layers" in str(moe_kernels.report(model))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no MoE layers"):
        moe_kernels.patch(model)


def test_enable_twice_then_disable_restores_everything(disabled):
    before = PreTrainedModel.get_correct_experts_implementation
    moe_kernels.enable()
    once = PreTrainedModel.get_correct_experts_implementation
    moe_kernels.enable()
    assert PreTrainedModel.get_correct_experts_implementation is once is not before
    assert is_enabled()
    moe_kernels.disable()
    assert PreTrainedModel.get_correct_experts_implementation is before and not is_enabled()
    moe_kernels.disable()
    assert implementation(make_model("qwen3_moe")) == "grouped_mm"


def test_a_wrapper_around_ours_survives_disable(disabled, monkeypatch):
    moe_kernels.enable()
    ours = PreTrainedModel.get_correct_experts_implementation
    monkeypatch.setattr(
        PreTrainedModel, "get_correct_experts_implementation", lambda self, requested: ours(self, requested)
    )
    moe_kernels.disable()
    assert implementation(make_model("qwen3_moe")) == "grouped_mm"
    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", ours._moe_kernels_original)


def test_live_model_survives_disable(disabled, ours):
    moe_kernels.enable()
    model = make_model("qwen3_moe")
    with ours(2, backward=True):
        expected = loss_and_gradients(model)
    moe_kernels.disable()
    assert implementation(model) == "moe_kernels"
    with ours(0):
        assert_same(loss_and_gradients(model), expected)
    (row, _) = moe_kernels.report(model).layers
    assert not row.accelerated and "disabled" in row.reason
    moe_kernels.enable()
    with ours(2):
        model(tokens())


def test_fp8_registry_knows_the_name(enabled):
    run = ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moe_kernels", None)
    calls = []
    mapping = type(ALL_FP8_EXPERTS_FUNCTIONS)._global_mapping
    stock, mapping["grouped_mm"] = mapping["grouped_mm"], lambda *args: calls.append(args)
    try:
        run("module", 1, 2, 3)
        moe_kernels.disable()
        ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moe_kernels", None)("module", 1, 2, 3)
    finally:
        mapping["grouped_mm"] = stock
    assert calls == [("module", 1, 2, 3)] * 2
    assert ALL_EXPERTS_FUNCTIONS.get_interface("moe_kernels", None) is grouped_mm_experts_forward


def test_patch_switches_a_live_model(disabled, ours):
    model = make_model("qwen3_moe")
    (row, _) = moe_kernels.report(model).layers
    assert (row.implementation, row.backend, row.accelerated) == ("grouped_mm", "stock", False)
    assert "built before moe_kernels was enabled" in row.reason
    with ours(0):
        expected = loss_and_gradients(model)
    assert moe_kernels.patch(model) is model
    assert not is_enabled(), "patch is for one model: the default stays"
    assert model.get_experts_implementation() == {"": "moe_kernels"}
    with ours(2, backward=True):
        assert_same(loss_and_gradients(model), expected)
    model.set_experts_implementation("eager")
    assert "eager" in moe_kernels.report(model).layers[0].reason


def test_patch_reaches_sub_models(disabled):
    text = {**make_config("qwen3_moe").to_dict(), "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    moe_kernels.patch(model)
    held = model.get_experts_implementation()
    assert held[""] == held["text_config"] == "moe_kernels"
    layers = moe_kernels.report(model).layers
    assert layers and all(row.implementation == "moe_kernels" for row in layers)


def test_undecorated_experts_are_reported(enabled):
    config = transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        interleave_moe_layer_step=1,
    )
    model = transformers.Llama4ForCausalLM(config)
    (row,) = moe_kernels.report(model).layers
    assert row.class_name == "Llama4TextExperts" and row.backend == "stock" and not row.accelerated
    assert "not switchable" in row.reason
    with pytest.raises(ValueError, match="Llama4ForCausalLM has no MoE layers"):
        moe_kernels.patch(model)


def test_report_renders(enabled):
    report = moe_kernels.report(make_model("deepseek_v3"))
    assert report.accelerated == 2 and [row.kind for row in report.layers] == ["experts"] * 2
    assert report.layers[0].name == "model.layers.1.mlp.experts"
    text = str(report)
    assert "2 of 2 MoE layers accelerated" in text and "model.layers.1..2.mlp.experts (2)" in text
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=200)
    console.print(report)
    assert "DeepseekV3Experts" in console.file.getvalue()


# recompute


def test_recompute(enabled, op_counter):
    model = make_model("qwen3_moe")
    expected = loss_and_gradients(model)
    moe_kernels.enable(recompute="pre_activation")
    with op_counter:
        assert_same(loss_and_gradients(model), expected)
    assert op_counter.calls["gate_up"] == 4, "two layers, forward and backward"
    moe_kernels.enable()
    moe_kernels.patch(model, recompute="pre_activation")
    for clone in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        op_counter.calls.clear()
        with op_counter:
            assert_same(loss_and_gradients(clone), expected)
        assert op_counter.calls["gate_up"] == 4
    op_counter.calls.clear()
    with op_counter:
        loss_and_gradients(moe_kernels.patch(model))
    assert op_counter.calls["gate_up"] == 2


@pytest.mark.parametrize("call", [moe_kernels.enable, lambda **kw: moe_kernels.patch(torch.nn.Linear(1, 1), **kw)])
def test_unknown_recompute(call, disabled):
    with pytest.raises(ValueError, match=r"recompute must be None or .*got 'everything'"):
        call(recompute="everything")


# accumulate_grad


def accumulated(model):
    """Loss and gradients of two micro-steps."""
    first = loss_and_gradients(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "zero_grad", lambda: None)
        loss, gradients = loss_and_gradients(model)
    return first[0] + loss, gradients


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])  # gpt-oss stores its weights transposed
def test_accumulate_grad(family, checkpointing, enabled, op_counter):
    model = make_model(family).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    expected = accumulated(model)
    layers = len(moe_kernels.report(model).layers)
    moe_kernels.patch(model, accumulate_grad=True)
    pickled = [] if checkpointing is not None else [pickle.loads(pickle.dumps(model))]
    for clone in (model, copy.deepcopy(model), *pickled):
        op_counter.calls.clear()
        with op_counter:
            assert_same(accumulated(clone), expected)
        assert op_counter.calls["grouped_wgrad_"] == 2 * layers
        assert all(row.accumulate_grad for row in moe_kernels.report(clone).layers)
    assert "moe_kernels, accumulate_grad" in str(moe_kernels.report(model))


def test_accumulate_grad_of_all_models_or_of_one(enabled):
    one, other = make_model("qwen3_moe"), make_model("qwen3_moe")

    def on(model):
        return {row.accumulate_grad for row in moe_kernels.report(model).layers}

    moe_kernels.patch(one, accumulate_grad=True)
    assert on(one) == {True} and on(other) == {False}
    moe_kernels.patch(one)
    assert on(one) == {False}
    moe_kernels.enable(accumulate_grad=True)
    assert on(one) == on(other) == {True}
    moe_kernels.enable()
    assert on(one) == on(other) == {False}


@pytest.mark.parametrize("call", [moe_kernels.enable, lambda **kw: moe_kernels.patch(torch.nn.Linear(1, 1), **kw)])
def test_accumulate_grad_is_a_bool(call, disabled):
    with pytest.raises(TypeError, match="accumulate_grad must be True or False, got 'yes'"):
        call(accumulate_grad="yes")


# Traces


def test_checkpoints_carry_no_trace(enabled, tmp_path):
    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "moe_kernels" not in file.read_text(), file
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert implementation(loaded) == "moe_kernels"
    state, state_0 = loaded.state_dict(), model.state_dict()
    assert state.keys() == state_0.keys() and all(torch.equal(state[k], state_0[k]) for k in state)
    assert torch.equal(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)
    moe_kernels.disable()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert implementation(stock) == "grouped_mm"


def test_pickle_deepcopy_and_torch_save(enabled):
    model = make_model("nemotron_h").eval()
    expected = model(tokens()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    for clone in copies:
        assert implementation(clone) == "moe_kernels"
        assert torch.equal(clone(tokens()).logits, expected)


def _spawned(model, queue):  # nothing here enables anything: the name that the model's config holds brings it along
    report = moe_kernels.report(model)
    rows = (*report.layers, *report.routers, *report.blocks)
    queue.put((model(tokens()).logits.tolist(), sum(row.accelerated for row in rows)))


@pytest.mark.parametrize("family, rows", [("mixtral", 4), ("nemotron_h_latent", 6)])
def test_spawn(family, rows, enabled):
    model = make_model(family).eval().requires_grad_(False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(model, queue))
    process.start()
    logits, accelerated = queue.get(timeout=120)
    process.join()
    assert accelerated == rows
    torch.testing.assert_close(torch.tensor(logits), model(tokens()).logits)


@pytest.mark.parametrize("chosen", [None, "moe_kernels"])
def test_saved_whole_and_loaded_where_nothing_was_enabled(enabled, tmp_path, chosen):
    options = {} if chosen is None else {"experts_implementation": chosen}
    model = make_model("qwen3_moe", **options).eval()
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "print(model(input_ids=torch.arange(16)[None]).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    expected = model(input_ids=torch.arange(16)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)


def test_what_is_no_model():
    for function in (moe_kernels.patch, moe_kernels.report):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("Qwen/Qwen3-30B-A3B")


# The front door


def test_every_public_name_and_subpackage():
    code = "import moe_kernels; [getattr(moe_kernels, n) for n in (*moe_kernels.__all__, 'functional', 'modules')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_misspelt_backend_fails_at_the_call():
    with pytest.raises(ValueError, match="name must be one of cuda, triton, reference or None, got 'tritn'"):
        moe_kernels.use_backend("tritn")


def test_auto_enables_and_keeps_earlier_options():
    code = (
        "import moe_kernels; moe_kernels.enable(recompute='pre_activation'); import moe_kernels.auto;"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as f;"
        "assert f['moe_kernels'].keywords == {'recompute': 'pre_activation', 'accumulate_grad': False};"
        "moe_kernels.disable(); import importlib; importlib.reload(moe_kernels.auto);"
        "assert f['moe_kernels'].keywords == {'recompute': None, 'accumulate_grad': False}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("found, fine", [("5.16.4", False), ("4.57.0", False), ("5.17.0.dev0", True), ("5.23.0", True)])
def test_old_transformers(found, fine, monkeypatch):
    monkeypatch.setattr(_version, "version", lambda name: found)
    if fine:
        return _version.require_transformers()
    with pytest.raises(ImportError, match=rf"transformers >= 5\.17\.0, found {found}"):
        _version.require_transformers()


def test_missing_transformers(monkeypatch):
    def version(name):
        raise _version.PackageNotFoundError(name)

    monkeypatch.setattr(_version, "version", version)
    with pytest.raises(ImportError, match="not installed"):
        _version.require_transformers()
