"""LoadBalancer and LoadBalanceCallback on the families' own routers and in a Trainer."""

import copy
import functools
import logging

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn
from torch.utils.data import Dataset

import moe_kernels
from moe_kernels.functional import routing_plan
from moe_kernels.integrations.transformers import experts, load_balance
from moe_kernels.integrations.transformers.load_balance import LoadBalancer
from moe_kernels.modules import TopKRouter
from tests.integrations.models import _COMMON, assert_same, loss_and_gradients, make_model, tokens

RATE = 0.125  # a power of two: sums of steps are exact

#: Beside those of models.py: where the bias is elsewhere, or a parameter. name -> (config, arguments, blocks)
OTHERS = {
    "afmoe": (
        "AfmoeConfig",
        {
            **_COMMON,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_dense_layers": 1,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
        },
        1,
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **_COMMON,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "use_expert_bias": True,
            "layer_types": ["conv", "full_attention"],
        },
        1,
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            **_COMMON,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        1,
    ),
}
FOUND = {"deepseek_v3": 2, "glm_moe_dsa": 2, "minimax_m2": 2, "nemotron_h": 2}
FOUND |= {name: blocks for name, (_, _, blocks) in OTHERS.items()}


def make(family: str, **options):
    if family not in OTHERS:
        return make_model(family, **options)
    name, arguments, _ = OTHERS[family]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments), **options).train()


def biases(model) -> list[torch.Tensor]:
    """Every selection bias, by name alone."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [t.detach().reshape(-1) for name, t in held.items() if name.rpartition(".")[2] in load_balance.BIASES]


def backward(model, seed: int = 0, batch: int = 2) -> None:
    ids = torch.randint(3, 128, (batch, 24), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def counts(balancer: LoadBalancer) -> torch.Tensor:
    return torch.stack([layer.counts_E for stack in balancer._stacks for layer in stack.layers])


class Seen:
    """The indices that the experts modules get, counted with bincount."""

    def __init__(self, model):
        self.counts = []
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                self.counts.append(torch.zeros(8, dtype=torch.int64))
                module.register_forward_pre_hook(functools.partial(self.add, self.counts[-1]))

    @staticmethod
    def add(counts, module, args):
        counts += args[1].flatten().bincount(minlength=8)


# What is found, and what is counted


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
@pytest.mark.parametrize("family", FOUND)
def test_every_family(family, ours, request):
    if ours:
        request.getfixturevalue("enabled")
    model = make(family)
    seen = Seen(model)
    balancer = LoadBalancer(model)
    assert len(balancer.layers) == FOUND[family] == len(biases(model))
    before = [bias.clone() for bias in biases(model)]
    for seed in range(3):
        backward(model, seed)
    assert torch.equal(counts(balancer), torch.stack(seen.counts))
    load = balancer.step(RATE)
    for bias, old, count in zip(biases(model), before, seen.counts, strict=True):
        assert torch.equal(bias, old + RATE * (count.double().mean() - count).sign().float())
        assert not torch.equal(bias, old)
    assert load.max_over_mean.tolist() == [pytest.approx(8 * (c.max() / c.sum()).item()) for c in seen.counts]
    assert not counts(balancer).any()
    balancer.remove()
    backward(model)
    assert not counts(balancer).any()


def test_our_own_module():
    """TopKRouter's ``selection_bias``, in a block or alone."""
    router = TopKRouter(16, 8, 2, scoring="sigmoid", selection_bias=True)
    balancer = LoadBalancer(router)
    router(torch.randn(32, 16))
    assert counts(balancer).sum() == 64
    balancer.step(RATE)
    assert router.selection_bias.abs().max() == RATE
    assert balancer.layers == ("",)


def test_a_model_without_a_selection_bias():
    with pytest.raises(ValueError, match=r"model must have a router with a selection bias .*, Qwen3MoeForCausalLM has"):
        LoadBalancer(make_model("qwen3_moe"))


def test_a_router_that_returns_no_indices():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.e_score_correction_bias = nn.Buffer(torch.zeros(4))

        def forward(self, x):
            return x, x

    odd = Odd()
    LoadBalancer(odd)
    with pytest.raises(TypeError, match=r"output of Odd must hold the expert indices .* got 0"):
        odd(torch.ones(2, 4))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "nemotron_h"])
def test_checkpointing_counts_once(family, reentrant):
    model = make(family)
    plain = LoadBalancer(model)
    backward(model)
    expected = counts(plain)
    plain.remove()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    runs = []
    model.get_submodule(plain.layers[0]).experts.register_forward_pre_hook(lambda *_: runs.append(1))
    balancer = LoadBalancer(model)
    backward(model)
    assert len(runs) == 2, "nothing was recomputed"
    assert torch.equal(counts(balancer), expected)


def test_evaluation_and_generation_are_not_counted():
    model = make("deepseek_v3")
    balancer = LoadBalancer(model)
    model.eval()
    with torch.no_grad():
        model(tokens())
    model.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)
    model.train()
    with torch.inference_mode():
        model(tokens())
    assert not counts(balancer).any()
    before = [bias.clone() for bias in biases(model)]
    assert balancer.step(RATE).entropy.isnan().all()  # no tokens: no metrics and no step
    assert all(map(torch.equal, biases(model), before))


def test_sentinels_are_not_counted():
    router = TopKRouter(16, 8, 2, selection_bias=True)
    router.register_forward_hook(lambda *_: (torch.ones(3, 2), torch.tensor([[0, 8], [-1, 7], [0, 9]])))
    balancer = LoadBalancer(router)
    # Ours comes first and sees the router's own ids, not those of a hook.
    router(torch.randn(3, 16))
    assert counts(balancer).sum() == 6
    load_balance._count(balancer._stacks[0].layers[0], router, (), (torch.tensor([[0, 8], [-1, 7], [0, 9]]),))
    assert counts(balancer).sum() == 9


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h_latent", "minimax_m2"])
def test_one_plan_for_the_counts_and_the_experts(family, enabled, op_counter):
    model = make(family)
    expected = loss_and_gradients(model)
    balancer = LoadBalancer(model)
    with op_counter:
        assert_same(loss_and_gradients(model), expected, 0)
    assert op_counter.calls["routing_plan"] == len(balancer.layers) == op_counter.calls["d_activation_"]


@pytest.mark.parametrize("change", ["other tensor", "in place", "fewer experts"])
def test_a_plan_of_other_indices_is_not_used(change):
    indices = torch.tensor([[0, 1], [2, 3]])
    plan = routing_plan(indices, 8)
    experts.hand_on(plan, indices)
    assert experts._plan_of(indices, 8) is plan
    if change == "other tensor":
        indices = indices.clone()
    elif change == "in place":
        indices[0, 0] = 8  # as expert parallelism marks what is elsewhere
    assert experts._plan_of(indices, 4 if change == "fewer experts" else 8) is indices


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled(checkpointing, enabled):
    model = make("deepseek_v3")
    eager = LoadBalancer(model)
    backward(model)
    expected = counts(eager)
    eager.remove()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    balancer = LoadBalancer(model)
    backward(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.equal(counts(balancer), expected)


def test_bf16_bias_has_an_fp32_master():
    model = make("minimax_m2", dtype=torch.bfloat16)
    for bias in biases(model):
        bias.fill_(1.0)
    balancer = LoadBalancer(model)
    hot = balancer._stacks[0].layers[0].counts_E
    for _ in range(40):
        hot[0] = 100
        balancer.step(1e-3)
    first, second = biases(model)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, torch.tensor([0.96] + [1.04] * 7).bfloat16())
    assert torch.equal(second, torch.ones(8).bfloat16())


def test_fp32_bias_is_its_own_master():
    """What somebody else writes into it between two steps counts."""
    model = make("deepseek_v3")
    balancer = LoadBalancer(model)
    for bias in biases(model):
        bias.fill_(3.0)
    backward(model)
    balancer.step(RATE)
    assert all((bias - 3).abs().max() <= RATE for bias in biases(model))


# Several processes


def _rank(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = make("deepseek_v3")
        balancer = LoadBalancer(model)
        for seed in range(rank, 4, 2):
            backward(model, seed)
        load = balancer.step(RATE)
        sharded = _sharded_step()
        results[rank] = ([bias.tolist() for bias in biases(model)], load.max_over_mean.tolist(), sharded)
    finally:
        dist.destroy_process_group()


def _sharded_step() -> list[float]:
    """FSDP2 shards afmoe's bias, a parameter."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = make("afmoe")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    balancer = LoadBalancer(model)
    backward(model)
    balancer.step(RATE)
    held = [p for name, p in model.named_parameters() if name.endswith("expert_bias")]
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in held)
    return held[0].full_tensor().tolist()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_ranks_equal_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (tmp_path / "store", results), nprocs=2)
        results = dict(results)
    model = make("deepseek_v3")
    balancer = LoadBalancer(model)
    for seed in range(4):
        backward(model, seed)
    load = balancer.step(RATE)
    torch.manual_seed(0)
    afmoe = make("afmoe")
    alone = LoadBalancer(afmoe)
    backward(afmoe)
    alone.step(RATE)
    expected = ([bias.tolist() for bias in biases(model)], load.max_over_mean.tolist(), biases(afmoe)[0].tolist())
    assert results == {0: expected, 1: expected}


# In a Trainer


class _Text(Dataset):
    def __init__(self, size: int = 4000):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        ids = torch.randint(3, 128, (32,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def train(model, path, callback, steps=2, before=None, **options):
    pytest.importorskip("accelerate")
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = transformers.TrainingArguments(output_dir=path, **(arguments | options))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Text(), eval_dataset=_Text(8))
    callback.attach(trainer) if before == "attach" else trainer.add_callback(callback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_evens_the_load(tmp_path, enabled):
    """The same run with the update and without it: with, the fullest expert loses its lead."""
    runs = {}
    for name, rate in (("with", 0.02), ("without", 0)):
        callback = moe_kernels.LoadBalanceCallback(rate)
        logs = train(make("deepseek_v3"), tmp_path / name, callback, steps=30)
        assert list(callback.history) == list(range(1, 31)) and len(logs) == 30
        runs[name] = logs
        layers = callback.balancer.layers
        assert layers == ("model.layers.1.mlp", "model.layers.2.mlp")
        picture = (tmp_path / name / "expert_load.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000

    def late(name, metric):
        return sum(log[f"expert_load/{metric}"] for log in runs[name][-5:]) / 5

    first = {name: logs[0]["expert_load/max_over_mean"] for name, logs in runs.items()}
    assert first["with"] == first["without"]  # the same tokens and weights
    assert late("with", "max_over_mean") < 0.8 * late("without", "max_over_mean")
    assert late("with", "entropy") > late("without", "entropy")
    log = runs["with"][-1]
    for metric in ("max_over_mean", "entropy"):
        each = [log[f"expert_load/{name}/{metric}"] for name in layers]
        assert log[f"expert_load/{metric}"] == pytest.approx(sum(each) / len(each))


def test_gradient_accumulation_is_one_step(tmp_path):
    """Four micro-batches of one move the bias as one batch of four, and evaluation between moves nothing."""
    model = make("deepseek_v3")
    start = [bias.clone() for bias in biases(model)]
    moved = []
    for size, accumulate, evaluate in ((4, 1, "no"), (1, 4, "no"), (1, 4, "steps")):
        copied = copy.deepcopy(model)
        callback = moe_kernels.LoadBalanceCallback(RATE, chart=None)
        train(
            copied,
            tmp_path,
            callback,
            steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            eval_strategy=evaluate,
            eval_steps=1,
        )
        moved.append((torch.stack(biases(copied)), callback.history[1]))
    assert (moved[0][0] - torch.stack(start)).abs().max() == RATE
    for other in moved[1:]:
        assert torch.equal(other[0], moved[0][0]) and other[1] == moved[0][1]
    assert not (tmp_path / "expert_load.png").exists()


def test_rate_may_depend_on_the_step(tmp_path):
    model, asked = make("deepseek_v3"), []

    def rate(step):
        asked.append(step)
        return RATE if step < 1 else 0

    before = torch.stack(biases(model))
    train(model, tmp_path, moe_kernels.LoadBalanceCallback(rate, chart=None), steps=3)
    assert asked == [0, 1, 2]
    assert (torch.stack(biases(model)) - before).abs().max() == RATE


def test_mean_over_steps_between_logs(tmp_path):
    callback = moe_kernels.LoadBalanceCallback(log_layers=False)
    (log,) = train(make("minimax_m2"), tmp_path, callback, steps=3, logging_steps=3)
    assert {key for key in log if key.startswith("expert_load/")} == {
        "expert_load/max_over_mean",
        "expert_load/entropy",
    }
    means = [sum(values) / len(values) for values in callback.history.values()]
    assert log["expert_load/max_over_mean"] == pytest.approx(sum(means) / 3, rel=1e-5)


@pytest.mark.parametrize("how, reaches", [("attach", True), ("callbacks", False)])
def test_reporting_integrations(how, reaches, tmp_path, monkeypatch):
    """What is in the Trainer before ours, as TensorBoard is, sees the values once attached."""
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Reporter])
    callback = moe_kernels.LoadBalanceCallback(chart=None)
    logs = train(make("deepseek_v3"), tmp_path, callback, before=how)
    assert all("expert_load/entropy" in log for log in logs)
    assert [("expert_load/entropy" in log) for log in seen if "loss" in log] == [reaches] * 2


def test_two_trainings_and_saving(tmp_path):
    """Hooks go when training ends; the biases are in the checkpoint."""
    model, callback = make("deepseek_v3"), moe_kernels.LoadBalanceCallback(RATE, chart=None)
    for _ in range(2):
        train(model, tmp_path, callback)
        assert list(callback.history) == [1, 2]
        assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("gate"))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, biases(again), biases(model)))


def test_without_matplotlib(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setattr(load_balance.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        train(make("deepseek_v3"), tmp_path, moe_kernels.LoadBalanceCallback())
    assert "expert_load.png is not drawn: it needs matplotlib" in caplog.text
    assert not (tmp_path / "expert_load.png").exists()


@pytest.mark.parametrize("rate", [-1, "fast", None, True])
def test_errors_name_the_argument(rate):
    with pytest.raises(ValueError, match=r"LoadBalanceCallback: rate must be a finite number, at least 0, got"):
        moe_kernels.LoadBalanceCallback(rate)


def test_training_a_model_without_a_selection_bias(tmp_path):
    with pytest.raises(ValueError, match="model must have a router with a selection bias"):
        train(make_model("qwen3_moe"), tmp_path, moe_kernels.LoadBalanceCallback())
