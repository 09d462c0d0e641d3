"""Blocks with latent projections around the experts (Nemotron-3 Super, Ultra): the last one adds the shared output."""

import copy
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor

import moe_kernels
from moe_kernels.integrations.transformers import blocks, families
from tests.helpers import relative_l2
from tests.integrations.models import assert_same, loss_and_gradients, make_model
from tests.integrations.test_blocks import CLASSES, AnyConfig, D, S, _Adapted, block_of, filled, run

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.fixture
def sums(monkeypatch):
    """Calls of ``addmm``: the product of a latent projection that adds the shared output."""
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: seen.append(args) or addmm(*args))
    return seen


def latent_block(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    cls = next(cls for cls in CLASSES if cls.__name__ == "NemotronHMoE")
    block = filled(cls(AnyConfig(**{"moe_latent_size": 8, **options}))).to(dtype)
    families.swap(block)
    return block


def of_stock(block: nn.Module, implementation: str = "eager") -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(block)
    families.restore(twin)
    twin.experts.config._experts_implementation = implementation
    return run(twin)


def test_latent_projections_add_the_shared_output(sums, residuals):
    model = make_model("nemotron_h_latent")
    rows = moe_kernels.report(model).blocks
    assert len(rows) == 2 and all(row.accelerated for row in rows)
    assert residuals(model) == 0 and len(sums) == 2
    actual = loss_and_gradients(model)
    families.restore(model)
    sums.clear()
    model.set_experts_implementation("eager")
    assert_same(actual, loss_and_gradients(model))
    assert not sums


def test_latent_projections_in_bf16(sums):
    """As near to the truth as stock, or nearer: the sum is rounded once instead of twice."""
    block = latent_block(torch.bfloat16)
    actual, stock = run(block), of_stock(block, "grouped_mm")
    truth = of_stock(copy.deepcopy(block).double())
    assert len(sums) == 1
    for name, exact in truth.items():
        assert actual[name].dtype == stock[name].dtype == torch.bfloat16
        error, error_0 = relative_l2(actual[name], exact), relative_l2(stock[name], exact)
        assert error < 1.5 * error_0 + 1e-3, f"{name}: {error}, stock {error_0}"


def test_latent_projections_under_autocast(sums):
    block = latent_block()
    truth = run(block)
    assert len(sums) == 1
    with torch.autocast("cpu", torch.bfloat16):
        actual, stock = run(block), of_stock(block)
    assert len(sums) == 2
    for name, expected in stock.items():
        assert actual[name].dtype == expected.dtype
        assert relative_l2(actual[name], truth[name]) < 2 * relative_l2(expected, truth[name]) + 1e-3, name


def test_latent_projections_compile(sums):
    block = latent_block()
    expected = run(block)
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    for name, value in run(block).items():
        assert relative_l2(value, expected[name]) < 1e-5, name


def _other_forward(linear):
    linear.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight) * 2, linear)


def _weight_norm(linear):
    nn.utils.parametrizations.weight_norm(linear)


def _output_hook(linear):
    linear.register_forward_hook(lambda module, args, out: out * 2)


def _input_hook(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _gradient_hook(linear):
    linear.register_full_backward_hook(lambda module, d_in, d_out: (d_in[0] * 2,))


def _offload(linear):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(linear, hooks.ModelHook())


def _subclass(linear):
    twice = {"forward": lambda self, x: nn.functional.linear(x, self.weight) * 2}
    linear.__class__ = type("QuantisedLinear", (nn.Linear,), twice)


@pytest.mark.parametrize(
    "disturb",
    [_other_forward, _weight_norm, _output_hook, _input_hook, _gradient_hook, _offload, _subclass],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("name", ["fc1_latent_proj", "fc2_latent_proj"])
def test_a_latent_projection_that_does_more_is_called(name, disturb, sums):
    block = latent_block()
    disturb(getattr(block, name))
    actual = run(block)
    assert len(sums) == (name == "fc1_latent_proj"), "the other projection is still a plain product"
    for key, expected in of_stock(block).items():
        assert relative_l2(actual[key], expected) < 2e-5, key


def test_an_adapted_latent_projection_is_called(sums):
    block = latent_block()
    block.fc2_latent_proj = _Adapted(block.fc2_latent_proj)
    actual = run(block)
    assert not sums and actual["fc2_latent_proj.lora.weight"].any()
    for key, expected in of_stock(block).items():
        assert relative_l2(actual[key], expected) < 2e-5, key


def test_a_latent_projection_with_a_bias_is_called(sums):
    block = latent_block(mlp_bias=True)
    actual = run(block)
    assert not sums and actual["fc2_latent_proj.bias"].any()
    for key, expected in of_stock(block).items():
        assert relative_l2(actual[key], expected) < 2e-5, key


def test_a_hook_on_no_projection_is_called(residuals):
    """Nano has Identities there."""
    model = make_model("nemotron_h")
    seen = []
    block_of(model).fc2_latent_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert residuals(model) == 1 and len(seen) == 1


def test_a_sharded_latent_projection_is_called(sums, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        linear, x = nn.Linear(8, D, bias=False), torch.randn(S, 8)
        expected = linear(x)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
        whole = [distribute_tensor(tensor, mesh) for tensor in (torch.zeros(S, D), x)]
        actual = blocks._add_projected(*whole, linear)
        assert not sums and relative_l2(actual.full_tensor(), expected) < 1e-6
    finally:
        dist.destroy_process_group()
