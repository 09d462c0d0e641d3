"""What people train with: Trainer, autocast, gradient checkpointing, PEFT, generate, torch.compile."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.data import Dataset

import moe_kernels
from tests.helpers import relative_l2
from tests.integrations.models import FAMILIES, assert_same, loss_and_gradients, make_model, tokens

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
def test_gradient_checkpointing(family, reentrant, op_counter):
    model = make_model(family)
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with op_counter:
        assert_same(loss_and_gradients(model), expected)
    layers = FAMILIES[family][2]
    assert op_counter.calls["gate_up"] == 2 * layers and op_counter.calls["d_activation_"] == layers


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2", "nemotron_h"])
def test_autocast_keeps_fp32_gradients(family, op_counter):
    """fp32 master weights under bf16 autocast: products in bf16 (stock's grouped_mm: fp32), gradients in fp32."""
    model = make_model(family)
    loss, gradients = loss_and_gradients(model)
    with op_counter, torch.autocast("cpu", torch.bfloat16):
        loss_16, gradients_16 = loss_and_gradients(model)
    assert all(dtypes[:2] == [torch.bfloat16] * 2 for dtypes in op_counter.dtypes["gate_up"])
    assert relative_l2(loss_16, loss) < 5e-3
    names = [name for name in gradients if "experts.up_proj" in name or "gate_up_proj" in name]
    assert names
    for name in names:
        assert gradients_16[name].dtype == torch.float32
        # two roundings to bf16 per layer; a few tokens may change their expert
        assert relative_l2(gradients_16[name], gradients[name]) < 0.5, name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_bf16_model(family, ours):
    model = make_model(family, dtype=torch.bfloat16)
    with ours(2, backward=True):
        loss, gradients = loss_and_gradients(model)
    model.set_experts_implementation("grouped_mm")
    loss_0, gradients_0 = loss_and_gradients(model)
    assert relative_l2(loss, loss_0) < 5e-3
    assert all(gradients[name].dtype == torch.bfloat16 for name in gradients)
    worst = max(relative_l2(gradients[name], gradients_0[name]) for name in gradients if "experts" in name)
    assert worst < 0.5, worst


class _Text(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def test_trainer_loss_curve_equals_stock(tmp_path, ours):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(implementation):
        model = make_model("qwen3_moe", experts_implementation=implementation)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            seed=0,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Text())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with ours(6, backward=True):
        losses = train(None)
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert losses == pytest.approx(train("grouped_mm"), rel=1e-4)


@pytest.mark.parametrize(
    "family, parameters",
    [
        ("qwen3_moe", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("nemotron_h", ["mixer.experts.up_proj", "mixer.experts.down_proj"]),
    ],
)
def test_peft_target_parameters(family, parameters, ours):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(family), config)
    layers = FAMILIES[family][2]
    with ours(layers, backward=True):
        actual = loss_and_gradients(model)
    assert actual[1] and all("lora" in name for name in actual[1])
    report = moe_kernels.report(model)
    assert report.accelerated == len(report.layers) == layers
    assert not any("Parametrized" in row.class_name for row in report.layers)
    for stock in ("grouped_mm", "eager"):
        model.base_model.model.set_experts_implementation(stock)
        assert_same(actual, loss_and_gradients(model))
    moe_kernels.patch(model)
    assert moe_kernels.report(model).accelerated == layers


def test_frozen_experts(ours):
    model = make_model("qwen3_moe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_()
    with ours(2):
        actual = loss_and_gradients(model)
    model.set_experts_implementation("grouped_mm")
    assert_same(actual, loss_and_gradients(model))


def test_router_logits_and_auxiliary_loss(ours):
    model = make_model("qwen3_moe")
    with ours(2):
        ours_out = model(tokens(), labels=tokens(), output_router_logits=True)
    model.set_experts_implementation("grouped_mm")
    stock_out = model(tokens(), labels=tokens(), output_router_logits=True)
    assert len(ours_out.router_logits) == 2
    assert relative_l2(ours_out.aux_loss, stock_out.aux_loss) < 1e-5
    assert relative_l2(ours_out.loss, stock_out.loss) < 1e-5


def test_generate(op_counter):
    model = make_model("qwen3_moe").eval()
    prompt = tokens(2, 8)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with op_counter:
        ours = model.generate(prompt, **options)
    assert op_counter.calls["gate_up"] >= 8 and not op_counter.calls["grouped_wgrad"]
    model.set_experts_implementation("eager")
    assert torch.equal(ours, model.generate(prompt, **options))


def test_fsdp2(ours):
    """One process: the machinery of sharding, un-sharding and its autograd is the same for one rank."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.fsdp import fully_shard

    model = make_model("qwen3_moe")
    expected = loss_and_gradients(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert moe_kernels.report(model).accelerated == 2
        with ours(2, backward=True):
            loss, gradients = loss_and_gradients(model)
        assert_same((loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2", "nemotron_h"])
def test_compile_fullgraph(family):
    model = make_model(family)
    expected = loss_and_gradients(model)
    forward, backward = [], []

    def record(into):
        def compiler(graph, example_inputs):
            into.append(graph.code)
            return make_boxed_func(graph)

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record(forward), bw_compiler=record(backward))
    ids = tokens()
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend=backend)(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((loss, gradients), expected)
    assert len(forward) == len(backward) == 1
    layers = FAMILIES[family][2]
    assert forward[0].count("moe_kernels.gate_up") == backward[0].count("moe_kernels.d_activation") == layers
