"""families.json: models at real size without memory, rows and check at shrunk sizes; training beside stock."""

import gc

import pytest
import torch
from torch import nn

from benchmarks import readme, training
from moe_kernels.bench import families, family_truth, results
from moe_kernels.bench.family_models import MODELS, router_of
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.measure import Measured
from tests.bench.conftest import PRODUCTS_MS

MEASURED = Measured(2.0, 5.0, 7.0, 8.0, 300.0, 900.0, 3.0)
TOKENS = 64
#: Of one layer's routed experts, in millions: 3 E I D, without a gate 2 E I D, and biases.
PARAMETERS = {
    "deepseek-v3": 11274.3,
    "glm-5": 9663.7,
    "minimax-m2.5": 3623.9,
    "qwen3.5-35b": 805.3,
    "qwen3.5-397b": 6442.5,
    "nemotron-3-nano": 1277.2,
    "nemotron-3-super": 2818.6,
    "nemotron-3-ultra": 10737.4,
    "qwen3-30b": 604.0,
    "gpt-oss-20b": 796.5,
    "glm-4.5-air": 2214.6,
    "olmoe-7b": 402.7,
    "mixtral": 1409.3,
}
NEMOTRON = {"nemotron-3-nano", "nemotron-3-super", "nemotron-3-ultra"}
LATENT = {"nemotron-3-super", "nemotron-3-ultra"}
WITH_SHARED = NEMOTRON | {"deepseek-v3", "glm-5", "qwen3.5-35b", "qwen3.5-397b", "glm-4.5-air"}
every_model = pytest.mark.parametrize("name", MODELS)


def shrunk(name: str):
    small = {"D": 64, "I": 32, "E": 16, "K": 4, "L": 48, "S": 40}
    model = MODELS[name]
    return model._replace(sizes={letter: min(small[letter], size) for letter, size in model.sizes.items()})


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """Everything is called, and takes what the test says."""

    def measure(forward, d_out):
        forward().backward(d_out)
        return MEASURED

    def in_turn(runs):
        for run in runs.values():
            run()
        return {name: PRODUCTS_MS.get(name, 0.125) for name in runs}

    monkeypatch.setattr(families, "measure", measure)
    monkeypatch.setattr(families, "medians_in_turn_ms", in_turn)
    monkeypatch.setattr(families.Session, "release", lambda session: None)  # a second each time, for nothing here


@every_model
def test_real_sizes(name):
    model = MODELS[name]
    block = model.build("meta")
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    millions = sum(parameter.numel() for parameter in block.experts.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=0.06)
    sizes, shape = model.sizes, model.experts_shape(families.TOKENS)
    assert shape.T == 8192 and sizes.get("L", sizes["D"]) == shape.D and router_of(block).top_k == sizes["K"]
    products = families.matrices(block)
    assert products["router"] == [(sizes["D"], sizes["E"])]
    assert ("shared" in products) == (name in WITH_SHARED) and ("latent" in products) == (name in LATENT)


@every_model
def test_router_settings(name):
    """Those of the published configs, read from the block."""
    block = MODELS[name].build("meta")
    router = router_of(block)
    biases = {key: buffer.dtype for key, buffer in block.named_buffers()}
    if name == "minimax-m2.5":
        assert biases == {"e_score_correction_bias": torch.bfloat16}
    elif MODELS[name].score != "sigmoid":
        assert not biases
    else:
        assert biases == {"gate.e_score_correction_bias": torch.float32}
        assert (router.num_group, router.topk_group) == ((8, 4) if name == "deepseek-v3" else (1, 1))
        scale = {"glm-4.5-air": 1.0, "nemotron-3-super": 5.0, "nemotron-3-ultra": 5.0}.get(name, 2.5)
        assert router.routed_scaling_factor == scale and router.norm_topk_prob
    if hasattr(router, "norm_topk_prob"):
        assert router.norm_topk_prob == (name != "olmoe-7b")
    if name == "gpt-oss-20b":
        assert (block.experts.alpha, block.experts.limit) == (1.702, 7)
    else:
        activation = {"relu": "ReLUSquaredActivation", "silu": "SiLUActivation"}["relu" if name in NEMOTRON else "silu"]
        assert type(block.experts.act_fn).__name__ == activation
    assert block.experts.has_gate == (name not in NEMOTRON)


@every_model
def test_the_truth_is_the_stock_block_in_fp32(name):
    layer = families.Layer(shrunk(name), TOKENS, "cpu")
    layer.block.float()
    layer.x, layer.d_out = layer.x.detach().float().requires_grad_(), layer.d_out.float()
    errors, choice = layer.errors()
    assert max(errors.values()) < 2e-6, errors
    assert {"out", "dx", "d_router", "dw_down"} < errors.keys()
    assert len(errors) == 2 + len(list(layer.block.parameters()))
    assert choice.indices_TK.shape == (TOKENS, layer.model.sizes["K"])


@every_model
def test_rows(session, name):
    step, row = families.run(session, shrunk(name), TOKENS)
    step()
    rows = session.rows["families.json"]
    block, bound, error = (f"{what}/{name}" for what in ("block", "bound", "error"))
    assert set(rows) == {
        bound,
        *(f"{error}/{implementation}" for implementation in ("grouped_mm", "moe_kernels")),
        *(f"{block}/uniform/{implementation}" for implementation in ("grouped_mm", "moe_kernels")),
    }
    assert row == rows[f"{block}/uniform/moe_kernels"]
    assert row["step_ms"] == 7 and row["peak_mib"] == 900 and row["times_stock"] == 1
    assert row["parts_accelerated"] == row["parts"] == 2 + (name in WITH_SHARED), row
    assert row["experts"] == row["router"] == "reference"
    errors, plain = rows[f"{error}/moe_kernels"], rows[f"{error}/grouped_mm"]
    assert plain.keys() == errors.keys() - {"over_plain", "tokens_elsewhere", "tokens_elsewhere_without_tie"}
    assert errors["over_plain"] == pytest.approx(max(errors[name] / plain[name] for name in plain), rel=1e-3)
    assert 0.5 < errors["over_plain"] < 2 and errors["tokens_elsewhere_without_tie"] == 0
    t_b = rows[bound]
    dense = 2 * 0.125 * (1 + (name in WITH_SHARED) + (name in LATENT))  # forward and backward
    assert t_b["step_ms"] == pytest.approx(t_b["experts_step_ms"] + dense, rel=1e-3)
    assert t_b["experts_step_ms"] == pytest.approx(sum(PRODUCTS_MS.values()) * t_b["padding"], rel=1e-2)
    assert row["step_over_bound"] == pytest.approx(7 / t_b["step_ms"], rel=1e-3)
    assert rows[f"{block}/uniform/grouped_mm"]["step_over_bound"] == row["step_over_bound"]


@pytest.mark.parametrize("name", ["qwen3-30b", "nemotron-3-super"])
def test_products_have_the_sizes_of_the_layer(name):
    model = shrunk(name)
    found = {key: run() for key, run in families.products(model, TOKENS, "cpu").items()}
    parameters = dict(model.build("meta").experts.named_parameters())
    up = parameters["up_proj" if name in NEMOTRON else "gate_up_proj"]
    per_expert, E = TOKENS * 4 // 16, 16
    assert found["dw_gate_up"].shape == up.shape and found["dw_down"].shape == parameters["down_proj"].shape
    assert found["up"].shape == (E, per_expert, up.shape[1]) and found["dx"].shape == (E, per_expert, up.shape[2])
    assert found["down"].shape == (E, per_expert, up.shape[2])
    assert found["d_a"].shape == (E, per_expert, parameters["down_proj"].shape[2])
    (logits,) = found["router_forward"]
    ((dx, dw),) = found["router_backward"]
    assert (logits.shape, dx.shape, dw.shape) == ((TOKENS, E), (TOKENS, 64), (E, 64))
    assert ("latent_forward" in found) == (name in LATENT)


# What is wrong has no time


def poison(monkeypatch, parameter: str, expert: int | slice, factor: float) -> None:
    """One gradient of ours, and not of stock, is off; and nothing of ours may be timed."""
    right, timed = families.gradients, families.measure

    def gradients(forward, leaves, d_out):
        values = right(forward, leaves, d_out)
        layer = forward.__self__
        if layer.block.experts.config._experts_implementation == "moe_kernels":
            values[1 + list(layer.leaves()).index(parameter)][expert] *= factor
        return values

    def measure(forward, d_out):
        assert forward.__self__.block.experts.config._experts_implementation != "moe_kernels", "it was timed"
        return timed(forward, d_out)

    monkeypatch.setattr(families, "gradients", gradients)
    monkeypatch.setattr(families, "measure", measure)


@pytest.mark.parametrize(
    "name, parameter, expert, label",
    [
        ("qwen3-30b", "experts.gate_up_proj", 3, "dw_gate_up"),
        ("nemotron-3-super", "fc2_latent_proj.weight", slice(None), "d_fc2_latent_proj"),
        ("gpt-oss-20b", "experts.down_proj_bias", slice(None), "d_bias_down"),
        ("deepseek-v3", "x", slice(None), "dx"),
    ],
)
def test_a_wrong_gradient_is_found(session, monkeypatch, name, parameter, expert, label):
    poison(monkeypatch, parameter, expert, 1.1)
    with pytest.raises(Inaccurate, match=f"block/{name}/uniform/moe_kernels: relative error of {label} is"):
        families.run(session, shrunk(name), TOKENS)
    rows = session.rows["families.json"]
    assert f"block/{name}/uniform/grouped_mm" in rows, "what was measured before it is kept"
    assert not [row for row in rows if row.endswith("moe_kernels")]


def test_a_gradient_that_is_no_number_is_found(session, monkeypatch):
    poison(monkeypatch, "experts.down_proj", 0, float("nan"))
    with pytest.raises(Inaccurate, match="relative error of dw_down is nan"):
        families.run(session, shrunk("mixtral"), TOKENS)


def test_a_router_that_leaves_out_the_bias_is_found(session, monkeypatch):
    """Each choice is held against its own truth, so the errors alone would not show it."""
    model = shrunk("deepseek-v3")
    right = families.patch

    def patch(block):
        right(block)
        block.gate.e_score_correction_bias = nn.Buffer(torch.linspace(-1, 1, 16))

    monkeypatch.setattr(families, "patch", patch)
    with pytest.raises(Inaccurate, match="tokens go to experts with other logits than stock's"):
        families.run(session, model, TOKENS)


def test_ties_may_go_either_way():
    logits = torch.tensor([[1.0, 1.0, 0.5, 0.0], [3.0, 2.0, 1.0, 0.0]])
    stock = families.Choice(logits, torch.tensor([[0, 2], [0, 1]]))
    ours = families.Choice(logits, torch.tensor([[2, 1], [1, 0]]))
    assert families._elsewhere(stock, ours) == (1, 0)
    ours.indices_TK[1] = torch.tensor([0, 2])
    assert families._elsewhere(stock, ours) == (2, 1)


# What does not fit


@pytest.mark.parametrize("place", ["checked", "timed"])
def test_stock_without_memory_says_so(session, monkeypatch, place):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30 GiB.\nmore")

    right, timed = families.Layer.errors, families.measure

    def is_stock(layer):
        return layer.block.experts.config._experts_implementation == "grouped_mm"

    if place == "checked":
        monkeypatch.setattr(families.Layer, "errors", lambda layer: full() if is_stock(layer) else right(layer))
    else:
        monkeypatch.setattr(
            families, "measure", lambda forward, d_out: (full if is_stock(forward.__self__) else timed)(forward, d_out)
        )
    row = families.run(session, shrunk("qwen3.5-35b"), TOKENS)[1]
    rows = session.rows["families.json"]
    stock = rows["block/qwen3.5-35b/uniform/grouped_mm"]
    assert stock == {"reason": f"out of memory when {place}: CUDA out of memory. Tried to allocate 30 GiB."}
    assert row["step_over_bound"] > 0 and "times_stock" not in row
    assert ("over_plain" in rows["error/qwen3.5-35b/moe_kernels"]) == (place == "timed")


def test_a_gpu_with_too_little_memory_is_told_from_one_that_has_it():
    h100, a100 = 79 * 2**30, 40 * 2**30
    assert not [name for name, model in MODELS.items() if families.why_not(model, h100)]
    assert families.why_not(MODELS["deepseek-v3"], a100) == "it needs 74 GiB of memory"
    assert families.why_not(MODELS["qwen3-30b"], a100) is None


def test_a_failure_keeps_no_layer_alive(session, monkeypatch):
    layers = []
    right = families.Layer.__init__

    def init(layer, *arguments):
        right(layer, *arguments)
        layers.append(torch.multiprocessing.reductions.StorageWeakRef(layer.block.experts.down_proj.untyped_storage()))

    monkeypatch.setattr(families.Layer, "__init__", init)
    monkeypatch.setattr(family_truth, "_expert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failure:
        families.run(session, shrunk("qwen3-30b"), TOKENS)
    gc.collect()
    assert failure.tb is not None and layers[0].expired()


# The README


def test_the_readme_has_a_table(tmp_path):
    machine = {"gpu": {"name": "a GPU", "driver": "1", "torch_cuda": "13"}, "content_hash": "0123"}
    machine["versions"] = dict.fromkeys(("torch", "triton", "transformers"), "1")
    ours = {"step_ms": 10.0, "step_over_bound": 1.2345, "times_stock": 3.0, "peak_mib": 1000.0}
    rows = {
        "block/olmoe-7b/uniform/moe_kernels": ours,
        "block/olmoe-7b/uniform/grouped_mm": {"step_ms": 30.0, "peak_mib": 3000.0},
        "block/deepseek-v3/uniform/grouped_mm": {"reason": "out of memory"},
        "block/deepseek-v3/uniform/moe_kernels": {"step_ms": 40.0, "step_over_bound": 1.3},
        "bound/olmoe-7b": {"step_ms": 8.1},
    }
    results.save(tmp_path / families.FILE, rows, machine)
    lines = readme.measured(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| deepseek-v3 | - | 40.0 | - | 1.30 | - | - |",
        "| olmoe-7b | 30.0 | 10.0 | 3.0 | 1.23 | 3000 | 1000 |",
    ]
    assert "content hash of the kernels `0123`" in readme.measured(tmp_path)


# On the CPU: training


@pytest.mark.parametrize("family", training.FAMILIES)
def test_training_equals_stock(family):
    found = training.rows(family)
    row, eager = (found[f"training/{family}/{name}"] for name in ("moe_kernels", "eager"))
    for metric, limit in (("first_gradients", 2e-5), ("losses", 2e-5), ("last_gradients", 1e-3)):
        assert row[metric] <= max(limit, 2 * eager[metric]), found  # on other processors rounding may do more
    assert row["last_over_first_loss"] < 0.96, "it learned nothing"


def test_training_that_differs_shows(monkeypatch):
    stock = training.train("minimax_m2", "grouped_mm", steps=2)
    monkeypatch.setattr(training, "LEARNING_RATE", 1.01 * training.LEARNING_RATE)
    found = training.compare(training.train("minimax_m2", "moe_kernels", steps=2), stock)
    assert found["first_gradients"] < 2e-5 < found["losses"] and found["last_gradients"] > 1e-4


def test_training_on_stock_by_mistake_is_refused(monkeypatch):
    monkeypatch.setattr(training.moe_kernels, "patch", lambda model: model)
    with pytest.raises(RuntimeError, match=r"Qwen3_5MoeForCausalLM: .*experts runs on stock"):
        training.train("qwen3_5_moe", "moe_kernels", steps=1)
