"""Whole blocks: the shared expert joins the experts' sum, and everything that must see the experts' output stops it."""

import ast
import importlib
import pathlib
import re

import pytest
import torch
import transformers
from torch import nn

import moe_kernels
from moe_kernels.integrations.transformers import blocks, families
from moe_kernels.integrations.transformers.fingerprint import fingerprint
from tests.helpers import relative_l2
from tests.integrations.models import assert_same, loss_and_gradients, make_model, tokens
from tests.integrations.test_routers import AnyConfig as RouterConfig

pytestmark = pytest.mark.usefixtures("enabled")

FUSED = ("deepseek_v3", "glm_moe_dsa", "qwen3_5_moe", "nemotron_h")


def block_of(model) -> nn.Module:
    return next(part.module for part in families.parts(model) if part.kind == "block")


@pytest.mark.parametrize("family", FUSED)
def test_fused_equals_stock(family, residuals):
    model = make_model(family)
    report = moe_kernels.report(model)
    assert len(report.blocks) == len(report.layers) and all(row.accelerated for row in report.blocks)
    assert residuals(model) == len(report.blocks)
    actual = loss_and_gradients(model)
    families.restore(model)
    assert residuals(model) == 0 and not any(families.is_ours(module) for module in model.modules())
    assert_same(actual, loss_and_gradients(model))
    model.set_experts_implementation("eager")
    assert_same(actual, loss_and_gradients(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2", "mixtral", "olmoe", "gpt_oss"])
def test_blocks_with_nothing_to_fuse_are_not_listed(family):
    report = moe_kernels.report(make_model(family))
    assert report.blocks == () and len(report.routers) == 2


def test_a_gradient_for_the_shared_expert_alone():
    model = make_model("deepseek_v3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("shared_experts" in name)
    actual = loss_and_gradients(model)
    families.restore(model)
    model.set_experts_implementation("eager")
    expected = loss_and_gradients(model)
    assert actual[1].keys() == expected[1].keys() and len(actual[1]) == 6
    assert_same(actual, expected)


# Guards


def _instance_forward(experts):
    stock = experts.forward
    experts.forward = lambda *args: stock(*args)


def _forward_hook(experts):
    experts.register_forward_hook(lambda module, args, out: out * 1)


def _pre_hook(experts):
    experts.register_forward_pre_hook(lambda module, args: None)


def _backward_hook(experts):
    experts.register_full_backward_hook(lambda module, d_in, d_out: None)


def _accelerate(experts):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(experts, hooks.ModelHook())


def _expert_parallel(experts):
    experts._is_expert_parallel = True


def _is_hooked(experts):
    experts._is_hooked = True


@pytest.mark.parametrize(
    "disturb",
    [_instance_forward, _forward_hook, _pre_hook, _backward_hook, _accelerate, _expert_parallel, _is_hooked],
    ids=lambda f: f.__name__.strip("_"),
)
def test_what_must_see_the_experts_alone_stops_the_fusion(disturb, residuals):
    model = make_model("deepseek_v3")
    expected = loss_and_gradients(model)
    disturb(block_of(model).experts)
    assert residuals(model) == 1, "the other layer goes on"
    assert_same(loss_and_gradients(model), expected)
    rows = moe_kernels.report(model).blocks
    assert [row.accelerated for row in rows] == [False, True] and rows[0].reason


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_another_implementation_runs_the_stock_block(implementation, residuals, op_counter):
    model = make_model("deepseek_v3")
    model.set_experts_implementation(implementation)
    with op_counter:
        model(tokens())
    assert not op_counter.calls
    model.set_experts_implementation("moe_kernels")
    assert residuals(model) == 2


def test_disable_runs_stock_and_enable_brings_it_back(residuals, op_counter):
    model = make_model("deepseek_v3")
    moe_kernels.disable()
    with op_counter:
        model(tokens())
    assert not op_counter.calls
    assert all("disabled" in row.reason for row in moe_kernels.report(model).blocks)
    moe_kernels.enable()
    assert residuals(model) == 2


def test_stock_experts_add_the_shared_output_outside(residuals):
    """Experts that we can't run go to grouped_mm inside a fused block: the sum is the same."""
    model = make_model("deepseek_v3")
    expected = loss_and_gradients(model)
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3Experts":
            module.act_fn = _OtherSiLU()
    assert residuals(model) == 0
    assert_same(loss_and_gradients(model), expected)
    assert [row.reason for row in moe_kernels.report(model).blocks] == ["its experts run on stock"] * 2


class _OtherSiLU(nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x)


class _Adapted(nn.Module):
    """What an adapter or a quantiser leaves in the place of a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora(x)


def test_hooks_and_adapters_of_the_shared_expert_and_the_router_are_seen(residuals):
    model = make_model("deepseek_v3")
    block, calls = block_of(model), []
    block.shared_experts.down_proj = _Adapted(block.shared_experts.down_proj)
    block.shared_experts.register_forward_hook(lambda module, args, out: calls.append(args[0].dim()))
    block.gate.register_forward_hook(lambda module, args, out: calls.append(out[0].dtype))
    assert residuals(model) == 2 and calls == [torch.float32, 3], "they get what the stock block gives them"
    actual = loss_and_gradients(model)
    assert any("lora" in name for name in actual[1])
    families.restore(model)
    model.set_experts_implementation("eager")
    assert_same(actual, loss_and_gradients(model))


def test_adapters_on_the_experts_run_the_stock_block(residuals):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(make_model("deepseek_v3"), config)
    assert residuals(model) == 0
    assert all("wrapped in ParamWrapper" in row.reason for row in moe_kernels.report(model).blocks)


@pytest.mark.parametrize("family", FUSED)
def test_autocast_and_bf16(family, residuals):
    model = make_model(family)
    truth = model(tokens(), labels=tokens()).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert residuals(model) == len(moe_kernels.report(model).blocks)
        torch.testing.assert_close(model(tokens(), labels=tokens()).loss, truth, rtol=5e-3, atol=0)
    model.bfloat16()
    assert residuals(model) == len(moe_kernels.report(model).blocks)


# Every class of the installed Transformers

B, S, D = 2, 7, 24


class AnyConfig(RouterConfig):
    """Whatever name a family's block reads its sizes by."""

    def __init__(self, **more):
        sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_intermediate_size"), 16)
        sizes |= dict.fromkeys(
            (
                "shared_expert_intermediate_size",
                "moe_shared_expert_intermediate_size",
                "shared_experts_intermediate_size",
            ),
            16,
        )
        sizes |= {"hidden_act": "silu", "mlp_hidden_act": "relu2", "rms_norm_eps": 1e-6, "mlp_bias": False}
        sizes |= {"moe_latent_size": None, "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "moe_num_shared_experts": 1}
        sizes |= {"enable_moe_fp32_combine": True, "shared_expert_combination_strategy": "sum", "use_bias": False}
        sizes |= {"dense_intermediate_size": 16, "moe_hidden_size": D, "num_hidden_layers": 2, "pretraining_tp": 1}
        sizes |= {"attention_bias": False, "moe_latent_dim": None, "swiglu_limits_shared": None, "swiglu_limits": None}
        super().__init__(**{**sizes, **more})


def block_classes() -> list[type]:
    found = []
    for path in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        names = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        names = [name for name in names if re.search("(?i)moe", name) and not re.search("Model|For|coder", name)]
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        found += [cls for name in names if fingerprint(cls := getattr(module, name)) in blocks.BLOCKS]
    return found


def filled(block: nn.Module) -> nn.Module:
    """Random numbers that choose experts far from ties."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return block


def run(block: nn.Module) -> dict[str, torch.Tensor]:
    """Output and every gradient."""
    block.zero_grad()
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = x.to(next(block.parameters()).dtype).requires_grad_()
    out = block(x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, **gradients}


CLASSES = block_classes()
VARIANTS = {
    "Cohere2MoeSparseMoeBlock": [{"shared_expert_combination_strategy": "average"}, {"num_shared_experts": 0}],
    "Ernie4_5_MoeSparseMoeBlock": [{"moe_num_shared_experts": 0}],
    "HYV3MoE": [{"enable_moe_fp32_combine": False}],
    "NemotronHMoE": [{"moe_latent_size": 8}],
}
CASES = [(cls, {}) for cls in CLASSES] + [(cls, more) for cls in CLASSES for more in VARIANTS.get(cls.__name__, [])]


@pytest.mark.parametrize("cls, options", CASES, ids=[f"{cls.__name__}-{options}" for cls, options in CASES])
def test_every_class(cls, options):
    block = filled(cls(AnyConfig(**options)))
    families.swap(block)
    report = moe_kernels.report(block)
    fuses = not options or options in ({"enable_moe_fp32_combine": False}, {"moe_latent_size": 8})
    assert len(report.blocks) == 1 and families.is_ours(block) == fuses
    assert report.blocks[0].accelerated == (fuses and report.layers[0].accelerated), report.blocks[0].reason
    actual = run(block)
    families.restore(block)
    assert type(block) is cls
    block.experts.config._experts_implementation = "eager"
    for name, expected in run(block).items():
        assert relative_l2(actual[name], expected) < 2e-5, name


def test_the_tables_cover_the_families():
    print("\n".join(f"{blocks.BLOCKS[fingerprint(c)].name:24} {fingerprint(c)} {c.__name__}" for c in CLASSES))
    names = {cls.__name__ for cls in CLASSES}
    assert len(names) >= 25
    assert {"DeepseekV3MoE", "GlmMoeDsaMoE", "Qwen3_5MoeSparseMoeBlock", "NemotronHMoE"} <= names
    assert not blocks.BLOCKS.keys() & (blocks.NOTHING_TO_FUSE | blocks.STAYS_STOCK.keys())
