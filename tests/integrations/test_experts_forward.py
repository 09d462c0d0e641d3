"""The experts function on single modules: every class of the installed Transformers, layouts, sentinels, dtypes."""

import ast
import importlib
import pathlib
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import activations
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward, use_experts_implementation

from moe_kernels import backends
from moe_kernels.integrations.transformers import experts as adapter
from moe_kernels.integrations.transformers import moe_kernels_experts_forward
from tests.helpers import naive_moe, relative_l2

pytestmark = pytest.mark.usefixtures("enabled")

T, K, E, D, I = 10, 3, 8, 16, 24  # noqa: E741


def decorated_classes() -> list[tuple[str, str]]:
    """(module, class) of every experts class that the installed Transformers decorates, read from its source."""
    found = []
    for path in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            names = [ast.unparse(d).partition("(")[0] for d in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.ClassDef) and "use_experts_implementation" in names:
                found.append((f"transformers.models.{path.parent.name}.{path.stem}", node.name))
    return found


class AnyConfig(SimpleNamespace):
    """Whatever name a family's experts read their sizes by."""

    def __init__(self, **more):
        sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E)
        sizes |= dict.fromkeys(("hidden_size", "moe_hidden_size"), D)
        sizes |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), I)
        sizes |= {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2"}
        sizes |= {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "moe_latent_size": None, "post_norm_eps": 1e-6}
        sizes |= {"mlp_gate_softcap": 8.0, "mlp_up_softcap": 8.0, "mlp_softcap": 8.0}
        super().__init__(**(sizes | more), _experts_implementation="moe_kernels")


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def inputs(experts: int = E, dtype=torch.float32):
    x = torch.randn(T, D, dtype=dtype)
    indices = torch.rand(T, experts).argsort(-1)[:, :K].contiguous()
    return x, indices, torch.rand(T, K) + 0.1


def run(module, implementation, x, indices, weights):
    """Output, and the gradients of x, the weights and every parameter."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = module(x, indices, weights)
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in module.parameters())]


def assert_equal_runs(actual, expected, limit=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and relative_l2(a, b) <= limit


def how_of(module):
    return adapter.judge(adapter.facts(module, *adapter.weights(module))).activation


def reason_of(module) -> str:
    return adapter.judge(adapter.facts(module, *adapter.weights(module))).reason


# Every class


#: Classes of 5.23: one with a soft-capped gate, one with a norm after each expert.
STAY_STOCK = {"Inkling2Experts", "MuseSparkExperts"}


def test_every_decorated_class(op_counter):
    """Classes that we take equal their own eager forward; the others say why and equal stock."""
    table, accelerated = [], 0
    for module_name, class_name in decorated_classes():
        experts_class = getattr(importlib.import_module(module_name), class_name)
        module = fill(experts_class(AnyConfig()))
        reason = reason_of(module)
        arguments = inputs()
        op_counter.calls.clear()
        with op_counter:
            actual = run(module, "moe_kernels", *arguments)
        assert op_counter.calls["gate_up"] == (reason is None), class_name
        assert op_counter.calls["d_activation_"] == (reason is None), class_name
        assert_equal_runs(actual, run(module, "eager" if reason is None else "grouped_mm", *arguments))
        accelerated += reason is None
        table.append(f"{class_name:40} {reason or 'accelerated'}")
    text = "\n".join([f"{accelerated} of {len(table)} accelerated", *table])
    print(text)
    assert len(table) >= 55 and accelerated >= 55, text
    assert accelerated + len(STAY_STOCK & {row.split()[0] for row in table}) == len(table), text


# Layouts and activations, on experts made here


def make(act_fn, *, gated=True, bias=False, layout=None, **overrides):
    """A decorated experts class such as a model file would have."""
    layout = {"has_gate": gated, "has_bias": bias, **(layout or {})}
    transposed = layout.get("is_transposed", False)

    @use_experts_implementation(**layout)
    class SomeExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = E, act_fn
            up = (E, I * (2 if gated else 1), D)
            for name, shape in (("gate_up_proj" if gated else "up_proj", up), ("down_proj", (E, D, I))):
                rows = shape[1]
                shape = (shape[0], shape[2], shape[1]) if transposed else shape
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
                if bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(E, rows)))

        def forward(self, *args):
            raise AssertionError("eager was not asked for")

    for name, value in overrides.items():
        setattr(SomeExperts, name, value)
    return fill(SomeExperts(AnyConfig()))


class LouderSiLU(activations.SiLUActivation):
    def forward(self, x):
        return super().forward(x) * 2


ACTS = {
    "silu": (activations.SiLUActivation(), "swiglu", "silu"),
    "nn.SiLU": (nn.SiLU(), "swiglu", "silu"),
    "gelu": (activations.GELUActivation(), "geglu", "gelu"),
    "nn.GELU": (nn.GELU(), "geglu", "gelu"),
    "nn.GELU tanh": (nn.GELU(approximate="tanh"), "geglu_tanh", "gelu_tanh"),
    "gelu_pytorch_tanh": (activations.GELUTanh(), "geglu_tanh", "gelu_tanh"),
    "gelu_new": (activations.NewGELUActivation(), "geglu_tanh", "gelu_tanh"),
    "F.silu": (nn.functional.silu, "swiglu", "silu"),
    "relu2": (activations.ReLUSquaredActivation(), None, "relu2"),
    "relu": (nn.ReLU(), None, None),
    "quick_gelu": (activations.QuickGELUActivation(), None, None),
    "subclass": (LouderSiLU(), None, None),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTS)
def test_activations(name, gated, bias, op_counter):
    act_fn, *ours = ACTS[name]
    activation = ours[0 if gated else 1]
    module = make(act_fn, gated=gated, bias=bias)
    assert how_of(module) == (activation and adapter.Activation(activation))
    arguments = inputs()
    with op_counter:
        actual = run(module, "moe_kernels", *arguments)
    assert op_counter.calls["gate_up"] == (activation is not None)
    assert_equal_runs(actual, run(module, "grouped_mm", *arguments))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_transposed_weights(gated, bias, ours):
    """Read as they lie; the gradients have the parameters' own layout, so that .grad takes them without a copy."""
    module = make(nn.SiLU(), gated=gated, bias=bias, layout={"is_transposed": True})
    arguments = inputs()
    with ours(1):
        actual = run(module, "moe_kernels", *arguments)
    assert all(p.grad.stride() == p.stride() for p in module.parameters())
    assert_equal_runs(actual, run(module, "grouped_mm", *arguments))


#: class -> what it maps to when its limit is 0.9 and its alpha 1.3
GATES = {
    "gpt_oss.GptOssExperts": ("swiglu_oai", 1.3, 0.9, True),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": ("swiglu_oai", 1.3, 0.9, False),
    "minimax_m3_vl.MiniMaxM3VLExperts": ("swiglu_oai", 1.3, 0.9, False),
    "deepseek_v4.DeepseekV4Experts": ("swiglu_clamp_before", None, 0.9, False),
    "glm5_next.Glm5NextTextExperts": ("swiglu_clamp_before", None, 0.9, False),
    "hy_v4.HYV4Experts": ("swiglu_clamp_before", None, 0.9, False),
    "step3p7.Step3p7Experts": ("swiglu_clamp_after", None, 0.9, False),
}


def gated_by_itself(path, **numbers) -> nn.Module:
    """One of them, with numbers that random data passes; Step3p7's, which Transformers doesn't decorate, decorated."""
    name, _, class_name = path.partition(".")
    stock_class = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), class_name)
    if name == "step3p7":
        methods = {key: vars(stock_class)[key] for key in ("__init__", "forward", "_apply_gate")}
        stock_class = use_experts_implementation(type(class_name, (stock_class,), methods))
    module = fill(stock_class(AnyConfig(**{"swiglu_limit": 0.9, "swiglu_alpha": 1.3})))
    numbers = {"alpha": 1.3, "limit": 0.9} | numbers
    for key, value in numbers.items():
        for attribute in (key, f"swiglu_{key}"):
            if hasattr(module, attribute):
                setattr(module, attribute, value)
    return module


@pytest.mark.parametrize("path", GATES)
def test_gates_of_their_own(path, ours):
    """Against the class's own eager forward, where many values are clamped; numbers are read at every forward."""
    module = gated_by_itself(path)
    assert how_of(module) == GATES[path]
    x, indices, weights = inputs()
    arguments = 2 * x, indices, weights
    with ours(1) as counter:
        actual = run(module, "moe_kernels", *arguments)
    assert counter.calls["d_activation_"] == 1
    assert all(p.grad.stride() == p.stride() for p in module.parameters())
    expected = run(module, "eager", *arguments)
    assert_equal_runs(actual, expected)
    other = gated_by_itself(path, limit=30.0)
    with ours(1):
        actual = run(other, "moe_kernels", *arguments)
    assert_equal_runs(actual, run(other, "eager", *arguments))
    assert relative_l2(actual[0], expected[0]) > 0.1, "nothing was clamped"


@pytest.mark.parametrize("recompute", [None, "pre_activation"])
@pytest.mark.parametrize("path", ["gpt_oss.GptOssExperts", "deepseek_v4.DeepseekV4Experts"])
def test_gates_of_their_own_compile(path, recompute):
    module = gated_by_itself(path)
    setattr(module, adapter.RECOMPUTE_ATTRIBUTE, recompute)
    arguments = inputs()
    expected = run(module, "moe_kernels", *arguments)
    torch._dynamo.reset()
    module.forward = torch.compile(module.forward, fullgraph=True, backend="aot_eager")
    assert_equal_runs(run(module, "moe_kernels", *arguments), expected)


def test_autocast_with_transposed_weights(ours):
    module = gated_by_itself("gpt_oss.GptOssExperts", limit=7.0)  # a rounded value beside a limit is another gradient
    x, indices, weights = inputs()
    expected = run(module, "eager", x, indices, weights)
    with ours(1), torch.autocast("cpu", torch.bfloat16):
        actual = run(module, "moe_kernels", x, indices, weights)
    assert_equal_runs(actual, expected, limit=3e-2)


def test_a_limit_of_infinity_is_none(ours):
    module = gated_by_itself("step3p7.Step3p7Experts", limit=float("inf"))
    assert how_of(module) == adapter.Activation("swiglu")
    arguments = inputs()
    with ours(1):
        actual = run(module, "moe_kernels", *arguments)
    assert_equal_runs(actual, run(module, "eager", *arguments))


def edited_gate(self, gate_up):
    """GptOssExperts' with another bound."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=-self.limit, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def test_an_unknown_gate_stays_stock(op_counter, monkeypatch):
    module = gated_by_itself("gpt_oss.GptOssExperts")
    monkeypatch.setattr(type(module), "_apply_gate", edited_gate)
    assert "_apply_gate" in reason_of(module)
    arguments = inputs()
    with op_counter:
        actual = run(module, "moe_kernels", *arguments)
    assert not op_counter.calls
    assert_equal_runs(actual, run(module, "grouped_mm", *arguments), limit=0)
    other = gated_by_itself("hy_v4.HYV4Experts")
    other._apply_gate = MethodType(edited_gate, other)  # on the instance alone
    assert "_apply_gate" in reason_of(other)


@pytest.mark.parametrize("limit", [None, 0.0, -1.0, float("nan"), "7"])
def test_a_limit_we_cant_take_stays_stock(limit):
    assert "limit is" in reason_of(gated_by_itself("deepseek_v4.DeepseekV4Experts", limit=limit))


def test_a_clamped_gate_around_another_nonlinearity_stays_stock():
    module = gated_by_itself("deepseek_v4.DeepseekV4Experts")
    module.act_fn = nn.GELU()
    assert "clamped gated activation GELU" in reason_of(module)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"layout": {"is_concatenated": False}}, "is_concatenated"),
        ({"_apply_gate": lambda self, h: h[:, :I] * h[:, I:]}, "_apply_gate"),
    ],
)
def test_stock_takes_what_we_dont_know(options, reason, op_counter):
    module = make(nn.SiLU(), **options)
    assert reason in reason_of(module)
    arguments = inputs()
    with op_counter:
        actual = run(module, "moe_kernels", *arguments)
    assert not op_counter.calls
    assert_equal_runs(actual, run(module, "grouped_mm", *arguments), limit=0)


def test_post_expert_norm_stays_stock():
    module = make(nn.SiLU())
    module.has_post_expert_norm = True
    assert "norm" in reason_of(module)


def test_quantised_and_wrapped_weights_stay_stock():
    module = make(nn.SiLU())
    up, down = adapter.weights(module)
    for wrong, reason in ((up.to(torch.float8_e4m3fn), "float8_e4m3fn"), (up.double(), "differ in dtype")):
        assert reason in adapter.judge(adapter.facts(module, wrong, down)).reason
    seen = list(adapter.facts(module, up, down))
    seen[adapter.Facts._fields.index("up_type")] = torch.distributed.tensor.DTensor
    assert "DTensors" in adapter.judge(tuple(seen)).reason


def test_one_warning_names_class_and_reason(monkeypatch):
    said = []
    monkeypatch.setattr(adapter.logger, "warning", said.append)
    adapter._warn_once.cache_clear()
    for _ in range(2):
        module = make(nn.ReLU())
        run(module, "moe_kernels", *inputs())
    assert len(said) == 1 and "SomeExperts" in said[0] and "gated activation ReLU" in said[0]


def test_unsupported_gpu_goes_to_stock():
    """What would run on the reference backend of a GPU runs on stock there, unless the user forces reference."""
    module = make(nn.SiLU())
    seen = adapter.facts(module, *adapter.weights(module))
    meta = torch.device("meta")  # neither a CPU nor a GPU: no kernels
    backend, reason = adapter.choose_backend(seen, meta, torch.float32)
    assert backend == "reference" and "triton" in reason
    with backends.use_backend("reference"):
        assert adapter.choose_backend(seen, meta, torch.float32) == ("reference", None)
    assert adapter.choose_backend(seen, torch.device("cpu"), torch.float32) == ("reference", None)


def test_extra_arguments_go_to_stock(op_counter):
    module = make(nn.SiLU())
    with op_counter, pytest.raises(TypeError, match="process_group"):  # stock decides what it knows
        moe_kernels_experts_forward(module, *inputs(), process_group=None)
    assert not op_counter.calls


def test_plain_object_instead_of_a_module(op_counter):
    module = make(nn.SiLU())
    plain = SimpleNamespace(
        num_experts=E,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        act_fn=nn.SiLU(),
        gate_up_proj=module.gate_up_proj.detach(),
        down_proj=module.down_proj.detach(),
        _is_expert_parallel=False,
        has_post_expert_norm=False,
    )
    arguments = inputs()
    plain._apply_gate = MethodType(_default_apply_gate, plain)
    with op_counter:
        actual = moe_kernels_experts_forward(plain, *arguments)
        assert op_counter.calls["gate_up"] == 1
        plain._apply_gate = lambda h: _default_apply_gate(plain, h)  # not known to be the default one: stock
        stock = moe_kernels_experts_forward(plain, *arguments)
        assert op_counter.calls["gate_up"] == 1
    assert relative_l2(actual, stock) <= 2e-5


# Sentinels


def test_sentinels_forward_and_gradients(ours):
    """Both -1 and ids from E up are "no expert": their weights get no gradient, their tokens nothing."""
    module = make(nn.SiLU())
    x, indices, weights = inputs()
    indices[::2, 0] = E
    indices[1::2, 1] = -1
    indices[3] = torch.tensor([E, E + 1, -1])
    x, weights = x.requires_grad_(), weights.requires_grad_()
    with ours(1, backward=True):
        out = module(x, indices, weights)
        out.square().sum().backward()
    actual = [out.detach(), x.grad, weights.grad, module.gate_up_proj.grad, module.down_proj.grad]
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights, module.gate_up_proj, module.down_proj)]
    truth = naive_moe(leaves[0], leaves[1], indices, *leaves[2:])
    truth.square().sum().backward()
    assert_equal_runs(actual, [truth.detach(), *(leaf.grad for leaf in leaves)])
    dropped = (indices < 0) | (indices >= E)
    assert not weights.grad[dropped].any() and not out[3].any() and not x.grad[3].any()


def test_expert_parallel_shard(ours):
    """Upstream's all-reduce EP: local ids, sentinel == num_experts with weight 0; the shards add up to the whole."""
    whole, (x, indices, weights) = make(nn.SiLU()), inputs()
    expected = run(whole, "grouped_mm", x, indices, weights)
    total = None
    for rank in range(2):
        shard, half = make(nn.SiLU()), E // 2
        for name, parameter in whole.named_parameters():
            shard.register_parameter(name, nn.Parameter(parameter.detach()[rank * half : (rank + 1) * half].clone()))
        shard.num_experts = half
        local = indices - rank * half
        elsewhere = (local < 0) | (local >= half)
        local, kept = local.masked_fill(elsewhere, half), weights.masked_fill(elsewhere, 0.0)
        with ours(1, backward=True):
            part = run(shard, "moe_kernels", x, local, kept)
        assert all(t.isfinite().all() for t in part)
        part[2] = part[2].masked_fill(elsewhere, 0)
        if total is None:
            total = part
        else:
            total = [a + b for a, b in zip(total[:3], part[:3])] + [torch.cat(p) for p in zip(total[3:], part[3:])]
    assert_equal_runs(total, expected)


def test_no_tokens(ours):
    module = make(nn.SiLU())
    with ours(1):
        out = module(torch.randn(0, D), torch.zeros(0, K, dtype=torch.int64), torch.rand(0, K))
    assert out.shape == (0, D)


# Dtypes


@pytest.mark.parametrize("hidden, weight", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_outside_autocast(hidden, weight, ours):
    module = make(nn.SiLU()).to(weight)
    arguments = inputs(dtype=hidden)
    with ours(1, backward=True):
        actual = run(module, "moe_kernels", *arguments)
    assert_equal_runs(actual, run(module, "grouped_mm", *arguments), limit=2e-2)
    assert actual[0].dtype == hidden and actual[3].dtype == weight


def test_autocast_with_fp32_parameters(op_counter):
    """Products in bf16, as eager does and grouped_mm doesn't; gradients in the dtype of the parameters."""
    module = make(nn.SiLU())
    x, indices, weights = inputs()
    expected = run(module, "grouped_mm", x, indices, weights)
    with op_counter, torch.autocast("cpu", torch.bfloat16):
        actual = run(module, "moe_kernels", x, indices, weights)
    assert op_counter.dtypes["gate_up"][0][:2] == [torch.bfloat16] * 2
    assert_equal_runs(actual, expected, limit=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_fp64_is_exact(ours):
    """Stock's grouped_mm refuses fp64, which a gradcheck through a whole model needs."""
    module = make(nn.SiLU()).double()
    x, indices, weights = inputs(dtype=torch.float64)
    with ours(1, backward=True):
        actual = run(module, "moe_kernels", x, indices, weights.double())
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights.double(), module.gate_up_proj, module.down_proj)]
    truth = naive_moe(leaves[0], leaves[1], indices, *leaves[2:])
    generator = torch.Generator().manual_seed(2)
    (truth * torch.randn(truth.shape, generator=generator)).sum().backward()
    assert_equal_runs(actual, [truth.detach(), *(leaf.grad for leaf in leaves)], limit=1e-12)


def test_autocast_leaves_fp64_alone():
    module = make(nn.SiLU()).double()
    x, indices, weights = inputs(dtype=torch.float64)
    expected = moe_kernels_experts_forward(module, x, indices, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe_kernels_experts_forward(module, x, indices, weights), expected)


def test_the_function_is_what_the_name_runs():
    module = make(nn.SiLU())
    arguments = inputs()
    named = module(*arguments)
    assert torch.equal(named, moe_kernels_experts_forward(module, *arguments))
    assert relative_l2(named, grouped_mm_experts_forward(module, *arguments)) <= 2e-5
