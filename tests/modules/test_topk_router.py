import copy

import pytest
import torch

from moe_kernels.modules import TopKRouter
from tests.helpers import relative_l2

T, D, E, K = 12, 16, 8, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def naive(router, x):
    logits = x.float() @ router.weight.float().T
    scores = logits.softmax(-1) if router.scoring == "softmax" else logits.sigmoid()
    choice = scores if router.selection_bias is None else scores + router.selection_bias
    indices = choice.topk(router.top_k).indices
    weights = scores.gather(1, indices)
    if router.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + router.epsilon)
    return weights * router.scale, indices, logits


@pytest.mark.parametrize("options", [{}, {"renormalize": False}, {"scoring": "sigmoid", "epsilon": 1e-9, "scale": 2.5}])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(options, bias):
    router = TopKRouter(D, E, K, selection_bias=bias, **options)
    if bias:
        router.selection_bias.normal_()
    x = torch.randn(T, D, requires_grad=True)
    out = router(x)
    truth = naive(router, x)
    assert torch.equal(out[1], truth[1])
    for a, b in zip(out, truth):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_l2(a, b) < 1e-6
    wanted = torch.randn(T, K)
    gradients = [
        torch.autograd.grad((weights * wanted).sum() + logits.square().sum(), (x, router.weight))
        for weights, _, logits in (out, truth)
    ]
    for a, b in zip(*gradients):
        assert relative_l2(a, b) < 1e-5


def test_groups_and_score_after_topk():
    router = TopKRouter(D, E, K, scoring="sigmoid", num_groups=4, top_groups=1)
    _, indices, _ = router(torch.randn(T, D))
    assert (indices // 2 == indices[:, :1] // 2).all(), "both experts come from one group of two"
    weights, indices, logits = TopKRouter(D, E, K, score_after_topk=True, renormalize=False)(torch.randn(T, D))
    torch.testing.assert_close(weights, logits.gather(1, indices).softmax(-1))


def test_group_score_and_losers_zero():
    x = torch.randn(T, D)
    options = {"scoring": "sigmoid", "num_groups": 2, "top_groups": 1, "selection_bias": True, "renormalize": False}
    routers = {
        "sum": TopKRouter(D, E, K, **options),
        "max": TopKRouter(D, E, K, group_score="max", **options),
        "zero": TopKRouter(D, E, K, losers_zero=True, **options),
    }
    for router in routers.values():
        router.load_state_dict({"weight": routers["sum"].weight, "selection_bias": torch.full((E,), -2.0)})
    scores = (x @ routers["sum"].weight.T).sigmoid()
    groups = scores.view(T, 2, E // 2)
    best = {"sum": groups.topk(2).values.sum(-1).argmax(1), "max": groups.amax(-1).argmax(1)}
    assert (best["sum"] != best["max"]).any(), "the two rules agree on this data"
    for name, group in best.items():
        weights, indices, _ = routers[name](x)
        assert (indices // (E // 2) == group[:, None]).all()
        torch.testing.assert_close(weights, scores.gather(1, indices))
    _, indices, _ = routers["zero"](x)
    assert (indices // (E // 2) != best["sum"][:, None]).all(), "0 beats every negative score + bias"


def test_min_sum_soft_cap_and_weights_dtype():
    x = torch.randn(T, D)
    router = TopKRouter(D, E, K, scoring="sigmoid", min_sum=4.0, soft_cap=0.2, weights_dtype=torch.bfloat16)
    weights, indices, logits = router(x)
    torch.testing.assert_close(logits, x @ router.weight.T)
    scores = (0.2 * torch.tanh(logits / 0.2)).sigmoid().gather(1, indices)
    assert weights.dtype == torch.bfloat16 and (scores.sum(-1) < 4).all()
    torch.testing.assert_close(weights, (scores / 4).bfloat16())


def test_logits_stay_fp32():
    """Rounded logits would choose other experts."""
    router = TopKRouter(D, E, K)
    x = torch.randn(T, D)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(router(x), expected))
    router.bfloat16()
    weights, _, logits = router(x.bfloat16())
    assert weights.dtype == logits.dtype == torch.float32
    assert relative_l2(logits, x.bfloat16().double() @ router.weight.double().T) < 1e-6
    assert TopKRouter(D, E, K, dtype=torch.float64)(x.double())[2].dtype == torch.float64


def test_selection_bias_is_not_rounded():
    router = TopKRouter(D, E, K, selection_bias=True)
    bias = router.selection_bias.normal_().clone()
    for cast in (router.bfloat16(), router.half(), copy.deepcopy(router), router.to("cpu")):
        assert torch.equal(cast.selection_bias, bias) and cast.selection_bias.dtype == torch.float32
    assert router.weight.dtype == torch.float16
    assert router.double().selection_bias.dtype == torch.float64
    assert TopKRouter(D, E, K, selection_bias=True, device="meta").to_empty(device="cpu").selection_bias.shape == (E,)


def test_state_dict_and_repr():
    assert set(TopKRouter(D, E, K).state_dict()) == {"weight"}
    more = {"soft_cap": 1.5, "group_score": "max"}
    router = TopKRouter(D, E, K, scoring="sigmoid", selection_bias=True, num_groups=2, scale=2.5, **more)
    assert set(router.state_dict()) == {"weight", "selection_bias"}
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    for part in ("top_k=2", "scoring=sigmoid", "selection_bias=True", "num_groups=2", "scale=2.5", "soft_cap=1.5"):
        assert part in repr(router)
    assert "group_score=max" in repr(router) and "min_sum" not in repr(router)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((0, E, K), {}, "hidden_size must be a positive integer, got 0"),
        ((D, E, 9), {}, "top_k must be at most num_experts = 8, got 9"),
        ((D, E, 1.5), {}, "top_k must be a positive integer, got 1.5"),
        ((D, E, K), {"scoring": "tanh"}, "scoring must be one of softmax, sigmoid, sqrtsoftplus, got 'tanh'"),
        ((D, E, K), {"num_groups": 3}, "num_groups must divide num_experts = 8"),
        ((D, E, K), {"num_groups": 8, "top_groups": 2}, "groups of two or more, got 8"),
        ((D, E, K), {"num_groups": 16, "group_score": "max"}, "into groups of one or more, got 16"),
        ((D, E, K), {"group_score": "mean"}, "group_score must be one of top2_sum, max, got 'mean'"),
        ((D, E, K), {"weights_dtype": torch.int64}, "weights_dtype must be one of None, .*, got torch.int64"),
        ((D, E, K), {"min_sum": -1.0}, "min_sum must be a finite number, 0 or positive, got -1.0"),
        ((D, E, K), {"soft_cap": float("inf")}, "soft_cap must be a finite number, 0 or positive, got inf"),
        ((D, E, K), {"epsilon": None}, "epsilon must be a finite number, 0 or positive, got None"),
        ((D, E, K), {"scale": "2.5"}, "scale must be a finite number, got '2.5'"),
        ((D, E, K), {"num_groups": 2, "top_groups": 3}, "top_groups must be at most num_groups = 2, got 3"),
        ((D, E, 5), {"num_groups": 2, "top_groups": 1}, "top_k must be at most the 4 experts"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=f"TopKRouter: .*{message}"):
        TopKRouter(*arguments, **options)
