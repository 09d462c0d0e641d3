"""The whole-model benchmark, as far as a CPU shows it: the model, its step, what counts as a compilation of ours."""

import types

import pytest
import torch

from moe_kernels import disable, enable, report
from moe_kernels.bench import model
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.functional.routing_plan import _block_m

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
    with pytest.raises(Inaccurate, match=r"ours: the loss is .*, stock's on the same weights 11\.93000"):
        model.check_loss("ours", loss, 11.93)


def test_rows_of_experts_that_are_right(monkeypatch, enabled):
    monkeypatch.setattr(model, "measure", lambda built, ids: {"step_ms": 1.0})
    rows = model.measure_steps(TINY, with_liger=False, device="cpu")
    assert list(rows) == ["model/tiny/grouped_mm", "model/tiny/moe_kernels"]
    assert all(row["step_ms"] == 1 and row["loss"] > 0 for row in rows.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [0, -1, 1.05], ids=["zeroed", "negated", "larger"])
def test_experts_that_are_wrong_are_refused(monkeypatch, enabled, factor, dtype):
    """The whole layer's experts, forward and so backward, times a factor, in ours only."""
    build = model.build

    def wrong(sizes, device):
        built = build(sizes, device).to(dtype)

        def scaled(experts, inputs, output):
            return output * factor if experts.config._experts_implementation == "moe_kernels" else output

        built.model.layers[0].mlp.experts.register_forward_hook(scaled)
        return built

    monkeypatch.setattr(model, "build", wrong)
    monkeypatch.setattr(model, "measure", lambda *_: {})
    monkeypatch.setattr(model, "check_loss", lambda *_: None)
    with pytest.raises(Inaccurate, match=r"model/tiny/moe_kernels: the gradient of gate_up_proj differs from stock's"):
        model.measure_steps(TINY, with_liger=False, device="cpu")


@pytest.mark.parametrize("place, name", [(0, "gate_up_proj"), (1, "down_proj")])
def test_each_gradient_is_compared(place, name):
    right = [torch.randn(4, 4), torch.randn(4, 4)]
    wrong = [tensor.clone() for tensor in right]
    model.check_gradients("ours", wrong, right)
    for value in (torch.nan, 0):
        wrong[place] = right[place] * value
        with pytest.raises(Inaccurate, match=f"ours: the gradient of {name} differs"):
            model.check_gradients("ours", wrong, right)


def test_routers_choose_again_what_they_chose():
    built, chosen = model.build(TINY, "cpu").float(), []
    gate, hidden = built.model.layers[0].mlp.gate, torch.randn(5, TINY.hidden)
    other = torch.randn(5, TINY.hidden)
    with model.same_choice(built, chosen):
        logits, scores, indices = gate(hidden)
    with model.same_choice(built, chosen):
        again = gate(hidden)
        forced = gate(other)[2]
    for a, b in zip(again, (logits, scores, indices), strict=True):
        torch.testing.assert_close(a, b)
    assert len(chosen) == 1 and forced.equal(indices) and not gate(other)[2].equal(indices)


def test_the_size_is_that_of_the_name():
    sizes = model.SIZES["qwen3-30b-4L"]
    assert sizes.batch * sizes.length == 16384
    with torch.device("meta"):
        built = model.build(sizes, "meta")
    assert sum(parameter.numel() for parameter in built.parameters()) == 3_114_814_464


def test_the_batches_change_as_they_should():
    sizes = model.SIZES["qwen3-30b-4L"]
    tokens, warm = ([batch * length for batch, length in batches] for batches in (model.CHANGING, model.WARM))
    assert len(set(tokens)) == 20 and not set(tokens) & {*warm, sizes.batch * sizes.length}
    tiles = [[_block_m(count * sizes.top_k, sizes.experts) for count in counts] for counts in (tokens, warm)]
    assert tiles[1] == [128, 64, 32, 16] and set(tiles[0]) == set(tiles[1])
    assert any(count % 2 for count in tokens) and any(count % 16 == 0 for count in tokens)
    assert {1, 17, 300} < set(tokens)


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
    assert model._counted("warm", compilations) == {"compilations_warm": 0, "compilations_warm_others": 0}


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
