import copy

import pytest
import torch

from moe_kernels.functional import routing_plan
from moe_kernels.modules import Experts
from tests.helpers import GATED, LAYOUTS, NUMBERS, naive_moe, relative_l2

T, D, I, E, K = 11, 16, 24, 5, 3  # noqa: E741
GPT_OSS = {"activation": "swiglu_oai", "alpha": 1.702, "limit": 7.0, "interleaved": True, "transposed": True}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(dtype=torch.float32):
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weights = torch.rand(T, K, requires_grad=True)
    return x, weights, torch.rand(T, E).argsort(-1)[:, :K]


@pytest.mark.parametrize("recompute", [None, "pre_activation"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation,interleaved", LAYOUTS)
def test_against_a_naive_loop(activation, interleaved, transposed, bias, recompute):
    alpha, limit = NUMBERS.get(activation, (None, None))
    layout = {"interleaved": interleaved, "transposed": transposed}
    numbers = {"activation": activation, "alpha": alpha, "limit": limit}
    experts = Experts(D, I, E, **numbers, **layout, bias=bias, recompute=recompute)
    x, weights, indices = problem()
    indices[0, 0], indices[1, 1] = -1, E  # no expert
    up = "gate_up_proj" if activation in GATED else "up_proj"
    biases = (getattr(experts, f"{up}_bias"), experts.down_proj_bias)
    out = experts(x, weights, indices)
    both = getattr(experts, up), experts.down_proj
    both = (w.mT for w in both) if transposed else both
    truth = naive_moe(x, weights, indices, *both, activation, *biases, interleaved)
    assert relative_l2(out, truth) < 1e-5
    leaves = (x, weights, *experts.parameters())
    wanted = torch.randn(T, D)
    gradients = [torch.autograd.grad((y * wanted).sum(), leaves) for y in (out, truth)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype and relative_l2(a, b) < 1e-5
    assert torch.equal(experts(x, weights, routing_plan(indices, E)), out)


@pytest.mark.parametrize(
    "options, shapes",
    [
        ({}, {"gate_up_proj": (E, 2 * I, D), "down_proj": (E, D, I)}),
        ({"activation": "relu2"}, {"up_proj": (E, I, D), "down_proj": (E, D, I)}),
        (
            GPT_OSS | {"bias": True},
            {
                "gate_up_proj": (E, D, 2 * I),
                "gate_up_proj_bias": (E, 2 * I),
                "down_proj": (E, I, D),
                "down_proj_bias": (E, D),
            },
        ),
        (
            {"bias": True},
            {
                "gate_up_proj": (E, 2 * I, D),
                "gate_up_proj_bias": (E, 2 * I),
                "down_proj": (E, D, I),
                "down_proj_bias": (E, D),
            },
        ),
    ],
)
def test_state_dict(options, shapes):
    experts = Experts(D, I, E, **options)
    assert {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()} == shapes
    clone = Experts(D, I, E, **options)
    clone.load_state_dict(experts.state_dict())
    x, weights, indices = problem()
    assert torch.equal(clone(x, weights, indices), experts(x, weights, indices))


@pytest.mark.parametrize("transposed", [False, True])
def test_initialised_like_nn_linear(transposed):
    experts = Experts(64, 128, 4, bias=True, transposed=transposed)
    for name, fan_in in (("gate_up_proj", 64), ("down_proj", 128)):
        weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias")
        bound = fan_in**-0.5
        assert weight.abs().max() <= bound and bias.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert (weight[0] != weight[1]).any()


def test_dtypes_and_devices():
    experts = Experts(D, I, E)
    x, weights, indices = problem()
    expected = experts(x, weights, indices)
    assert copy.deepcopy(experts).double()(x.double(), weights, indices).dtype == torch.float64
    low = copy.deepcopy(experts).bfloat16()(x.bfloat16(), weights, indices)
    assert low.dtype == torch.bfloat16 and relative_l2(low, expected) < 2e-2
    meta = Experts(D, I, E, device="meta", dtype=torch.bfloat16)
    assert meta.gate_up_proj.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert meta(x.bfloat16(), weights, indices).isfinite().all()
    with pytest.raises(TypeError, match=r"w_gate_up must be torch\.float32 like x"):
        Experts(D, I, E).bfloat16()(x, weights, indices)


def test_autocast(op_counter):
    experts = Experts(D, I, E)
    x, weights, indices = problem()
    expected = experts(x, weights, indices)
    with op_counter, torch.autocast("cpu", torch.bfloat16):
        out = experts(x, weights, indices)
    assert op_counter.dtypes["gate_up"][0][0] == torch.bfloat16
    assert out.dtype == torch.float32 and relative_l2(out, expected) < 2e-2
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in experts.parameters())


def test_repr():
    text = repr(Experts(D, I, E, **GPT_OSS))
    assert all(f"{name}={value}" in text for name, value in GPT_OSS.items())
    text = repr(Experts(D, I, E, activation="geglu", recompute="pre_activation"))
    assert "limit" not in text and "transposed" not in text
    assert "num_experts=5" in text and "activation=geglu" in text and "recompute=pre_activation" in text


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((0, I, E), {}, "hidden_size must be a positive integer, got 0"),
        ((D, -1, E), {}, "intermediate_size must be a positive integer, got -1"),
        ((D, I, True), {}, "num_experts must be a positive integer, got True"),
        ((D, I, E), {"activation": "mish"}, "activation must be one of swiglu, .*got 'mish'"),
        ((D, I, E), {"activation": "swiglu_oai", "alpha": 1.702}, "limit must be a positive finite number, .*got None"),
        ((D, I, E), {"activation": "swiglu_oai", "alpha": 1.0, "limit": "7"}, "limit must be a positive .*got '7'"),
        ((D, I, E), {"limit": 7.0}, "limit must be None: swiglu has none, got 7.0"),
        ((D, I, E), {"activation": "relu2", "interleaved": True}, "interleaved must be False: relu2 has no gate"),
        ((D, I, E), {"recompute": "all"}, "recompute must be one of None, pre_activation, got 'all'"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=f"Experts: {message}"):
        Experts(*arguments, **options)
