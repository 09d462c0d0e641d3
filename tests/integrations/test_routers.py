"""Every router of the installed Transformers against the adapter: logits, weights, indices, gradients, dtypes."""

import ast
import copy
import functools
import importlib
import inspect
import io
import pathlib
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import moe_kernels
from moe_kernels.integrations.transformers import families, routers
from moe_kernels.integrations.transformers.fingerprint import fingerprint
from tests.helpers import relative_l2
from tests.integrations.models import make_model, tokens

pytestmark = pytest.mark.usefixtures("enabled")

T, E, D, K = 33, 16, 24, 3


class AnyConfig(SimpleNamespace):
    """Whatever name a family's router reads its sizes by."""

    def __init__(self, **more):
        sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E)
        sizes |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k"), K)
        sizes |= dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), 2.5)
        sizes |= {"moe_router_topk": K, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "hidden_size": D}
        sizes |= {"moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 1.5, "scoring_func": "sqrtsoftplus"}
        sizes |= {"topk_method": "group_limited_greedy", "moe_norm_min": 1e-12, "use_expert_bias": True}
        sizes |= {"expert_selection_fn": "sigmoid", "use_bias": False, "moe_norm_topk_prob": True}
        sizes |= {"output_multiplier": 0.5, "num_shared_experts": 1, "n_shared_experts": 1, "router_bias": True}
        super().__init__(**{**sizes, "_experts_implementation": "moe_kernels", **more})

    def __getattr__(self, name):
        raise AttributeError(name)


def router_classes() -> list[type]:
    """Every class of the installed Transformers whose source is in the table of rules."""
    found = []
    for path in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if "experts" not in text:
            continue
        names = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        names = [name for name in names if "Router" in name or "Gate" in name]
        if names:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found += [cls for name in names if fingerprint(cls := getattr(module, name)) in routers.ROUTERS]
    return found


def build(cls: type, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A router far from ties, as Transformers builds it, with our class."""
    module = cls(AnyConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if "bias" in name else 0.4))
            if "e_score" not in name and cls.__name__ != "Inkling2TopKRouter":  # stock keeps these in fp32
                tensor.data = tensor.data.to(dtype)
    module.__class__ = families.ours(cls)
    setattr(module, routers.CONFIG_ATTRIBUTE, AnyConfig())
    return module


def stock_of(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    families.restore(twin)
    return twin


def run(module: nn.Module, x: torch.Tensor, *more):
    """(what it returns, gradients of x and of every parameter that has one)"""
    module.zero_grad()
    x = x.clone().requires_grad_()
    result = module(x, *more)
    generator = torch.Generator().manual_seed(3)
    total = 0
    for tensor in result:
        if tensor.is_floating_point():
            scale = torch.randn(T, E, generator=generator).to(x.device)
            indices = next(t for t in result if not t.is_floating_point())
            scale = scale.gather(1, indices) if tensor.shape[1] == K else scale
            total = total + (tensor.float() * scale).sum()
    total.backward()
    return result, [x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_same(actual, expected, limit):
    for ours, stock in zip(actual[0], expected[0], strict=True):
        assert ours.dtype == stock.dtype and ours.shape == stock.shape
    experts = [next(t for t in r[0] if not t.is_floating_point()) for r in (actual, expected)]
    order = [e.argsort(-1) for e in experts]
    assert torch.equal(*(e.gather(1, o) for e, o in zip(experts, order, strict=True)))
    for ours, stock in zip(actual[0], expected[0], strict=True):
        if ours.is_floating_point():
            if ours.shape[1] == K:
                ours, stock = ours.gather(1, order[0]), stock.gather(1, order[1])
            assert relative_l2(ours, stock) <= limit
    for ours, stock in zip(actual[1], expected[1], strict=True):
        assert ours.dtype == stock.dtype and relative_l2(ours, stock) <= limit


def arguments(module: nn.Module, dtype: torch.dtype) -> tuple:
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    rule = routers.ROUTERS[fingerprint(families.stock_class(type(module)))]
    takes_3d = "afmoe" in type(module).__module__
    bias = torch.randn(E, generator=torch.Generator().manual_seed(2)) * 0.1
    return (x if takes_3d else x[0], *([bias] if rule.bias == routers.ARGUMENT else []))


CLASSES = router_classes()
VARIANTS = {
    "DeepseekV2TopkRouter": [{"topk_method": "greedy"}],
    "Cohere2MoeTopKRouter": [{"expert_selection_fn": "softmax"}, {"norm_topk_prob": False}],
    "DeepseekV3TopkRouter": [{"norm_topk_prob": False}, {"n_group": 1, "topk_group": 1}],
    "AXK2TopkRouter": [{"n_group": None}],
    "Qwen3MoeTopKRouter": [{"norm_topk_prob": False}],
    "Lfm2MoeTopKRouter": [{"norm_topk_prob": False}],
    "LagunaTopKRouter": [{"moe_router_logit_softcapping": 0.0}],
}
CASES = [(cls, {}) for cls in CLASSES] + [(cls, more) for cls in CLASSES for more in VARIANTS.get(cls.__name__, [])]


def test_the_table_covers_the_families():
    names = {cls.__name__ for cls in CLASSES}
    print(
        "\n".join(f"{routers.ROUTERS[fingerprint(cls)].name:24} {fingerprint(cls)} {cls.__name__}" for cls in CLASSES)
    )
    assert len(names) >= 50
    assert {"DeepseekV3TopkRouter", "GlmMoeDsaTopkRouter", "NemotronHTopkRouter", "Qwen3_5MoeTopKRouter"} <= names
    assert {"Qwen3MoeTopKRouter", "MiniMaxM2TopKRouter", "GptOssTopKRouter", "MixtralTopKRouter"} <= names


@pytest.mark.parametrize("cls, options", CASES, ids=[f"{cls.__name__}-{options}" for cls, options in CASES])
def test_equals_stock(cls, options, op_counter):
    module = build(cls, **options)
    rule = routers.ROUTERS[fingerprint(cls)]
    assert routers.why_not(module, rule) is None
    given = arguments(module, torch.float32)
    with op_counter:
        actual = run(module, *given)
    assert op_counter.calls["topk_route"] == 1
    stock = stock_of(module)
    assert type(stock) is cls
    assert_same(actual, run(stock, *given), 1e-5)


@pytest.mark.parametrize("cls", CLASSES, ids=[cls.__name__ for cls in CLASSES])
def test_bf16_dtypes_and_indices(cls):
    """The logits are stock's own, so the choice is too wherever no rounded scores tie; stock rounds in more places."""
    module = build(cls, torch.bfloat16)
    given = arguments(module, torch.bfloat16)
    assert_same(run(module, *given), run(stock_of(module), *given), 1e-2)


# Without a rule


class EditedRouter(nn.Module):
    """What a new release might make of a router that we know."""

    def __init__(self):
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(E, D)), K

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, indices = logits.softmax(-1).square().topk(self.top_k)
        return logits, weights, indices


def test_an_unknown_source_is_left_alone_and_reported():
    model = make_model("qwen3_moe")
    layer = model.model.layers[0].mlp
    layer.gate = EditedRouter()
    families.restore(model)
    moe_kernels.patch(model)
    assert type(layer.gate) is EditedRouter and families.ours(EditedRouter) is EditedRouter
    unknown, known = moe_kernels.report(model).routers
    assert not unknown.accelerated and "no rule for its source" in unknown.reason and known.accelerated


def test_a_class_whose_forward_was_replaced_is_left_alone(monkeypatch):
    cls = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter
    stock = cls.forward
    assert fingerprint(cls) in routers.ROUTERS

    @functools.wraps(stock)
    def patched(self, hidden_states):
        return stock(self, hidden_states * 2)

    monkeypatch.setattr(cls, "forward", patched)
    assert fingerprint(cls) is None
    assert all(row.backend == "stock" for row in moe_kernels.report(make_model("qwen3_moe")).routers)


@pytest.mark.parametrize(
    "name, module", [("PhimoeTopKRouter", "phimoe"), ("ZayaRouter", "zaya"), ("DeepseekV4HashRouter", "deepseek_v4")]
)
def test_what_stays_stock_says_why(name, module):
    cls = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    assert fingerprint(cls) in routers.STAYS_STOCK


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"n_group": 16, "topk_group": 4}, "16 groups"),
        ({"n_group": 8, "topk_group": 1}, "3 of 16 experts in 1 of 8 groups"),
    ],
)
def test_groups_that_only_stock_takes(options, reason):
    cls = next(cls for cls in CLASSES if cls.__name__ == "DeepseekV3TopkRouter")
    assert reason in routers.why_not(cls(AnyConfig(**options)), routers.ROUTERS[fingerprint(cls)])


# A router in a model


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "minimax_m2", "mixtral", "olmoe", "gpt_oss"])
def test_recorded_logits_and_auxiliary_loss(family, op_counter):
    model = make_model(family)
    ids = tokens()
    with op_counter:
        actual = model(ids, labels=ids, output_router_logits=True)
    assert op_counter.calls["topk_route"] == len(actual.router_logits) == len(moe_kernels.report(model).routers)
    families.restore(model)
    model.set_experts_implementation("eager")
    expected = model(ids, labels=ids, output_router_logits=True)
    for ours, stock in zip(actual.router_logits, expected.router_logits, strict=True):
        assert ours.dtype == stock.dtype and relative_l2(ours, stock) < 2e-5
    assert relative_l2(actual.aux_loss, expected.aux_loss) < 1e-5 and relative_l2(actual.loss, expected.loss) < 1e-5


def test_bf16_upcast_without_an_fp32_copy():
    """DeepSeek-V3's logits are fp32 products of bf16 numbers: what is kept for the backward is the bf16 tokens."""
    module = build(next(cls for cls in CLASSES if cls.__name__ == "DeepseekV3TopkRouter"), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True))
    assert not [t for t in kept if t.shape == (T, D) and t.dtype == torch.float32]


def test_autocast_keeps_fp32_logits():
    module = build(next(cls for cls in CLASSES if cls.__name__ == "DeepseekV3TopkRouter"))
    x = torch.randn(T, D)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# A class like any other


def test_the_class_looks_like_stock():
    model = make_model("deepseek_v3")
    gate = model.model.layers[1].mlp.gate
    stock = families.stock_class(type(gate))
    assert type(gate) is not stock and isinstance(gate, stock)
    assert type(gate).__name__ == stock.__name__ and type(gate).__qualname__ == stock.__qualname__
    assert type(gate).__module__ == stock.__module__ and repr(gate).startswith(stock.__name__)
    assert inspect.signature(gate.forward) == inspect.signature(stock(model.config).forward)
    keys = model.state_dict().keys()
    families.restore(model)
    assert type(gate) is stock and model.state_dict().keys() == keys and not hasattr(gate, routers.CONFIG_ATTRIBUTE)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5_moe"])
def test_copies_are_ours_too(family):
    model = make_model(family).eval()
    expected = model(tokens()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickles = [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for clone in (copy.deepcopy(model), torch.load(buffer, weights_only=False), *pickles):
        report, report_0 = moe_kernels.report(clone), moe_kernels.report(model)
        assert report == report_0 and all(row.accelerated for row in (*report.routers, *report.blocks))
        assert torch.equal(clone(tokens()).logits, expected)
        gate, experts = next((p.module, p.experts) for p in families.parts(clone) if p.kind == "router")
        assert getattr(gate, routers.CONFIG_ATTRIBUTE) is experts.config
    shallow = copy.copy(model.model.layers[-1].mlp)
    assert type(shallow) is type(model.model.layers[-1].mlp)


def test_a_pickle_of_another_release_gives_stock(monkeypatch):
    """The class in the pickle is the stock one: where its source is unknown, stock is what comes out."""
    gate = make_model("deepseek_v3").model.layers[1].mlp.gate
    stored = pickle.dumps(gate)
    monkeypatch.setattr(routers, "ROUTERS", {})
    families._ours.cache_clear()
    try:
        clone = pickle.loads(stored)
    finally:
        families._ours.cache_clear()
    assert type(clone) is families.stock_class(type(gate)) and torch.equal(clone.weight, gate.weight)
