"""The whole-model benchmark, as far as a CPU shows it: the model, its step, what counts as a compilation of ours."""

import types

import pytest
import torch

from moe_kernels import disable, enable, report
from moe_kernels.bench import model

TINY = model.SIZES["tiny"]


@pytest.fixture
def enabled():
    enable()
    yield
    disable()


def test_a_step_on_stock_experts_and_on_ours(enabled):
    built = model.build(TINY, "cpu")
    assert built.training and built.dtype == torch.bfloat16
    assert built.config._attn_implementation == "sdpa"
    ids = model.random_ids(TINY, "cpu")
    losses = []
    for experts, accelerated in zip(model.EXPERTS, (0, TINY.layers), strict=True):
        built.set_experts_implementation(experts)
        built.zero_grad()
        losses.append(model.step(built, ids).item())
        assert report(built).accelerated == accelerated
        assert all(parameter.grad is not None for parameter in built.parameters())
    model.check_loss("tiny", losses[1], losses[0])


@pytest.mark.parametrize("loss", [11.93 * (1 + 2 * model.MOST_LOSS_DIFFERENCE), float("nan")])
def test_another_loss_is_refused(loss):
    with pytest.raises(ValueError, match=r"ours: the loss is .*, stock's on the same weights 11\.93000"):
        model.check_loss("ours", loss, 11.93)


def test_the_size_is_that_of_the_name():
    sizes = model.SIZES["qwen3-30b-4L"]
    assert sizes.batch * sizes.length == 16384
    with torch.device("meta"):
        built = model.build(sizes, "meta")
    assert sum(parameter.numel() for parameter in built.parameters()) == 3_114_814_464


def test_the_batches_change_as_they_should():
    tokens = [batch * length for batch, length in model.CHANGING]
    assert len(set(tokens)) == 20
    sizes = model.SIZES["qwen3-30b-4L"]
    rows_per_expert = [count * sizes.top_k / sizes.experts for count in tokens]
    assert min(rows_per_expert) > 64, "another tile size: these are for SMALL"
    assert any(count % 2 for count in tokens) and any(count % 16 == 0 for count in tokens)
    assert max(length * sizes.top_k / sizes.experts for _, length in model.SMALL) <= 64
    assert (1, 1) in model.SMALL


def test_compilations_of_ours_and_others():
    compilations = model.Compilations()
    for module in ("moe_kernels.backends.triton.combine", "liger_kernel.ops.rms_norm", "moe_kernels_of_others"):
        compilations._seen(key=1, fn=types.SimpleNamespace(module=module, name="_kernel"))
    counted = model._counted("after", compilations)
    assert counted == {
        "compilations_after": 1,
        "compilations_after_others": 2,
        "compiled_after": "moe_kernels.backends.triton.combine._kernel",
    }
    assert model._counted("small", compilations) == {"compilations_small": 0, "compilations_small_others": 0}


def test_a_first_step_starts_with_empty_caches(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    seen = {}

    def watch(command, limits, stage, environment):
        seen[stage] = environment["TRITON_CACHE_DIR"]
        return {"stage": stage}

    monkeypatch.setattr(model, "watch", watch)
    for what in ("steps", "first-step"):
        assert model.measured(what, TINY) == {"stage": what}
    assert seen["steps"] == "/somewhere"
    assert seen["first-step"].endswith("/triton") and seen["first-step"] != "/somewhere/triton"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["model", "--what", "steps"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        model.main()
