import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moe_kernels.functional import topk_route
from tests.helpers import Target, assert_close, bitwise_equal, odd_rows, shifted
from tests.tolerances import RELATIVE_L2

OP = "topk_route"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of inf and NaN in the interpreter
ON_CPU = Target("reference", "cpu", torch.float32)

# (id, arguments of topk_route, number of experts)
KINDS = [
    ("softmax-qwen3", {"top_k": 8, "renormalize": True}, 128),
    ("softmax-plain", {"top_k": 2}, 8),
    ("softmax-topk1", {"top_k": 1, "renormalize": True}, 5),
    ("softmax-all-experts", {"top_k": 6}, 6),
    ("sigmoid", {"top_k": 3, "scoring": "sigmoid", "scale": 2.5}, 20),
    ("sigmoid-renormalized", {"top_k": 4, "scoring": "sigmoid", "renormalize": True, "epsilon": 1e-20}, 16),
    ("after-topk-gpt-oss", {"top_k": 4, "score_after_topk": True}, 32),
    ("after-topk-sigmoid", {"top_k": 2, "scoring": "sigmoid", "score_after_topk": True, "renormalize": True}, 9),
    ("groups-deepseek", {"top_k": 4, "scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 1.5}, 32),
    ("groups-softmax", {"top_k": 2, "num_groups": 3, "top_groups": 1, "renormalize": True}, 12),
    ("groups-max", {"top_k": 3, "num_groups": 8, "top_groups": 3, "group_score": "max", "losers_zero": True}, 40),
    ("groups-of-one", {"top_k": 3, "num_groups": 9, "top_groups": 4, "group_score": "max"}, 9),
    ("sqrtsoftplus", {"top_k": 4, "scoring": "sqrtsoftplus", "renormalize": True, "epsilon": 1e-20, "scale": 1.5}, 48),
    ("sqrtsoftplus-plain", {"top_k": 3, "scoring": "sqrtsoftplus"}, 7),
    ("soft-cap", {"top_k": 3, "scoring": "sigmoid", "renormalize": True, "soft_cap": 2.0}, 16),
    ("soft-cap-softmax", {"top_k": 3, "soft_cap": 3.0}, 24),
    ("clamped-sum", {"top_k": 2, "renormalize": True, "min_sum": 0.35}, 16),
]
TABLE = pytest.mark.parametrize("how,experts", [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])


def naive_indices(choice_TE, top_k, num_groups=1, top_groups=1, group_score="top2_sum", losers_zero=False):
    """Best first, ties to the lowest index, a NaN last: Python's sort on (-score, index)."""
    rows = []
    for row in choice_TE.tolist():
        row = [-torch.inf if score != score else score for score in row]
        size = len(row) // num_groups
        groups = range(num_groups)
        if num_groups > 1:
            best = 1 if group_score == "max" else 2
            merit = [sum(sorted(row[g * size : (g + 1) * size])[-best:]) for g in groups]
            merit = [-torch.inf if m != m else m for m in merit]
            groups = sorted(groups, key=lambda g: (-merit[g], g))[:top_groups]
        allowed = [e for e in range(len(row)) if e // size in groups]
        if losers_zero:
            row = [score if e in allowed else 0.0 for e, score in enumerate(row)]
            allowed = range(len(row))
        rows.append(sorted(allowed, key=lambda e: (-row[e], e))[:top_k])
    return torch.tensor(rows).reshape(-1, top_k)


def naive_scores(z, scoring):
    if scoring == "softmax":
        return torch.exp(z - z.logsumexp(-1, keepdim=True))
    return 1 / (1 + torch.exp(-z)) if scoring == "sigmoid" else torch.log1p(torch.exp(z)).sqrt()


def naive_weights(
    logits,
    indices,
    scoring="softmax",
    score_after_topk=False,
    renormalize=False,
    epsilon=0.0,
    scale=1.0,
    min_sum=0.0,
    soft_cap=0.0,
):
    z = logits.gather(1, indices) if score_after_topk else logits
    z = soft_cap * torch.tanh(z / soft_cap) if soft_cap else z
    p = naive_scores(z, scoring)
    w = p if score_after_topk else p.gather(1, indices)
    if renormalize:
        w = w / (w.sum(-1, keepdim=True) + epsilon).clamp(min=min_sum)
    return w * scale


def split(how):
    names = ("top_k", "num_groups", "top_groups", "group_score", "losers_zero")
    groups = {key: how[key] for key in names if key in how}
    return groups, {key: value for key, value in how.items() if key not in groups}


def logits_of(T, E, target=ON_CPU):
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(T * E)) * 2
    return logits.to(target.device, target.dtype)


@TABLE
@pytest.mark.parametrize("T", [0, 1, 63])
def test_against_sorted_scores(target, how, experts, T):
    logits = logits_of(T, experts, target)
    weights, indices = topk_route(logits, **how)
    assert weights.dtype == torch.float32 and indices.dtype == torch.int64

    groups, scoring = split(how)
    z = logits.double().cpu()
    capped = scoring["soft_cap"] * torch.tanh(z / scoring["soft_cap"]) if "soft_cap" in scoring else z
    score = naive_scores(capped, scoring.get("scoring", "softmax"))
    expected = naive_indices(z if scoring.get("score_after_topk") else score, **groups)
    # bf16 logits tie often; those ties are settled on the same side in fp32 and fp64, being exact in both
    assert torch.equal(indices.cpu(), expected)
    assert_close(weights.cpu(), naive_weights(z, expected, **scoring), what="weights")


@TABLE
def test_gradient_in_fp64(how, experts):
    logits = logits_of(3, experts).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: topk_route(z, **how)[0], logits)


@TABLE
def test_gradient_against_autograd(target, how, experts):
    logits = logits_of(33, experts, target).requires_grad_()
    weights, indices = topk_route(logits, **how)
    d_weights = torch.randn_like(weights)
    weights.backward(d_weights)
    assert logits.grad.dtype == logits.dtype

    def gradient(dtype):
        z = logits.detach().to(dtype).requires_grad_()
        naive_weights(z, indices, **split(how)[1]).backward(d_weights.to(dtype))
        return z.grad

    if how["top_k"] == 1 and how.get("renormalize"):
        # the weight is 1 whatever the logits: the truth is zero, what is left is rounding
        assert logits.grad.abs().max() <= RELATIVE_L2[torch.float32] * d_weights.abs().max()
    else:
        assert_close(logits.grad, gradient(torch.float64), gradient(target.dtype), "d_logits")


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("score_after_topk", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=["one-group", "groups"])
@pytest.mark.parametrize(
    "bad",
    [
        [torch.nan],
        [torch.inf],
        [-torch.inf],
        [torch.nan, torch.inf, -torch.inf],
    ],
    ids=["nan", "inf", "-inf", "mixed"],
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_bad_logits_still_choose_distinct_experts(target, scoring, score_after_topk, groups, bad, biased):
    T, E, K = 20, 16, 6
    logits = logits_of(T, E, target)
    generator = torch.Generator().manual_seed(0)
    for t in range(T):  # from one bad entry to a whole bad row
        where = torch.randperm(E, generator=generator)[: 1 + t * E // T]
        values = list(itertools.islice(itertools.cycle(bad), len(where)))
        logits[t, where.to(logits.device)] = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    logits[-1] = bad[0]
    how = {"scoring": scoring, "score_after_topk": score_after_topk, "num_groups": groups[0], "top_groups": groups[1]}
    if biased:
        how |= {"selection_bias_E": torch.linspace(-1, 1, E, device=target.device), "losers_zero": True}
    _, indices = topk_route(logits, K, **how)
    ids = indices.sort(-1).values
    assert ((ids[:, 1:] - ids[:, :-1]) > 0).all(), "an expert was chosen twice"
    assert (ids >= 0).all() and (ids < E).all()


def test_nan_is_chosen_last(target):
    logits = torch.tensor([[torch.nan, 1.0, 3.0, torch.nan, 2.0, -9.0]], device=target.device, dtype=target.dtype)
    _, indices = topk_route(logits, 5, score_after_topk=True)
    assert indices.tolist() == [[2, 4, 1, 5, 0]]


def test_ties_go_to_the_lowest_index(target):
    logits = torch.zeros(5, 64, device=target.device, dtype=target.dtype)
    logits[1, 40:] = 1
    logits[2, ::7] = -1
    _, indices = topk_route(logits, 6)
    assert torch.equal(indices.cpu(), naive_indices(logits.cpu(), 6))


def test_bias_chooses_but_does_not_weigh(target):
    logits = logits_of(50, 16, target).requires_grad_()
    bias = torch.linspace(0.6, -0.6, 16, device=target.device).requires_grad_()
    how = {"scoring": "sigmoid", "renormalize": True}
    weights, indices = topk_route(logits, 4, selection_bias_E=bias, **how)
    score = logits.detach().double().cpu().sigmoid()
    expected = naive_indices(score + bias.detach().double().cpu(), 4)
    assert torch.equal(indices.cpu(), expected)
    assert not torch.equal(expected, naive_indices(score, 4)), "the bias must change the choice for this to test it"
    assert_close(weights.cpu(), naive_weights(logits.detach().double().cpu(), expected, **how), what="weights")
    weights.sum().backward()
    assert bias.grad is None and logits.grad is not None


def test_strided_logits(target):
    logits = logits_of(24, 40, target)
    for view in (logits[:, 1::2], logits[:, :20], logits.T[:20].T):
        whole = topk_route(view.contiguous(), 3)
        for ours, expected in zip(topk_route(view, 3), whole):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("experts", [20, 21])
@pytest.mark.parametrize("place", [shifted, odd_rows])
def test_rows_that_are_not_aligned(target, place, experts):
    """Of logits, bias, and all that the backward reads."""
    how = {"scoring": "sigmoid", "renormalize": True, "epsilon": 1e-20, "scale": 2.5}
    logits, bias = place(logits_of(33, experts, target)), place(torch.linspace(0.6, -0.6, experts).to(target.device))
    weights, indices = topk_route(logits, 4, selection_bias_E=bias, **how)
    z = logits.double()
    assert torch.equal(indices.cpu(), naive_indices((z.sigmoid() + bias.double()).cpu(), 4))
    assert_close(weights, naive_weights(z, indices, **how), what="weights")

    d_weights = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)).to(target.device)
    rule = "sigmoid", False, True, 1e-20, 2.5
    d_logits = torch.ops.moe_kernels.topk_route_bwd(place(d_weights), logits, place(indices), *rule)

    def gradient(dtype):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(naive_weights(leaf, indices, **how), leaf, d_weights.to(dtype))[0]

    assert_close(d_logits, gradient(torch.float64), gradient(target.dtype), "d_logits")


@st.composite
def routers(draw):
    """Integer logits and biases: their sums are exact in every dtype, and they tie often."""
    num_groups, members = draw(st.integers(1, 5)), draw(st.integers(2, 21))
    top_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, min(32, members * top_groups)))
    bad = (math.nan, math.inf, -math.inf)
    values = st.sampled_from((-3.0, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, *(bad if draw(st.booleans()) else ())))
    row = st.lists(values, min_size=num_groups * members, max_size=num_groups * members)
    logits = torch.tensor(draw(st.lists(row, min_size=1, max_size=5)))
    bias = torch.tensor(draw(row)) if draw(st.booleans()) else None
    group_score = draw(st.sampled_from(("top2_sum", "max")))
    groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
    return logits, bias, top_k, groups | {"losers_zero": draw(st.booleans())}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(router=routers())
def test_any_router_chooses_as_the_sort_does(target, router):
    logits, bias, top_k, groups = router
    on_target = logits.to(target.device, target.dtype)
    bias_E = None if bias is None else bias.to(target.device)
    weights, indices = topk_route(
        on_target, top_k, score_after_topk=True, scoring="sigmoid", selection_bias_E=bias_E, **groups
    )
    if bias is None:  # the losers of a router without bias are out
        expected = naive_indices(logits, top_k, **groups | {"losers_zero": False})
    else:
        expected = naive_indices(logits + bias, top_k, **groups)
    assert torch.equal(indices.cpu(), expected)
    chosen = logits.gather(1, expected).double().sigmoid()
    torch.testing.assert_close(weights.cpu().double(), chosen, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("losers_zero", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_bias_and_groups(target, scoring, losers_zero):
    """Negative choices: a loser's 0 is better than they are."""
    T, groups = 17, {"top_k": 8, "num_groups": 4, "top_groups": 2, "losers_zero": losers_zero}
    logits = logits_of(T, 80, target)
    bias = torch.linspace(-3.5, -0.6, 80)[torch.randperm(80, generator=torch.Generator().manual_seed(1))]
    _, indices = topk_route(logits, scoring=scoring, selection_bias_E=bias.to(target.device), **groups)
    choice = naive_scores(logits.double().cpu(), scoring) + bias
    assert torch.equal(indices.cpu(), naive_indices(choice, **groups))
    if losers_zero:
        assert not torch.equal(indices.cpu(), naive_indices(choice, **groups | {"losers_zero": False}))


@pytest.mark.parametrize("top_k,experts", [(32, 1024), (22, 512), (14, 400), (8, 256)])
def test_many_experts(target, top_k, experts):
    how = {"top_k": top_k, "scoring": "sigmoid", "renormalize": True, "epsilon": 1e-20, "scale": 2.5}
    logits = logits_of(7, experts, target).requires_grad_()
    bias = 0.1 * torch.randn(experts, generator=torch.Generator().manual_seed(0))
    weights, indices = topk_route(logits, **how, selection_bias_E=bias.to(target.device))
    z = logits.detach().double().cpu()
    best = (z.sigmoid() + bias).sort(-1, descending=True)
    assert torch.equal(indices.cpu(), best.indices[:, :top_k])
    how.pop("top_k")
    assert_close(weights.detach().cpu(), naive_weights(z, indices.cpu(), **how), what="weights")


def hard_rows(E, K):
    """Rows on which a choice by a threshold, a list of limited length or a few rounds could go wrong, by name."""
    g = torch.Generator().manual_seed(E * K)
    e = torch.arange(E, dtype=torch.float32)
    random = torch.randn(E, generator=g)
    best = torch.randperm(E, generator=g)[:K]
    of_lane = (e % 128 < 4) | (e % 256 < 8)  # what one thread loads, of 4 bytes and of 2
    one_lane = torch.where(of_lane, random.abs() + 4, random)
    return {
        "random": random,
        "equal": torch.full((E,), -1.5),
        "two values": (random > 0).float(),
        "one better": torch.where(e == E - 1, 1.0, 0.0),
        "K - 1 better": torch.where(e >= E - K + 1, e, 0.0),
        "K better, equal": torch.zeros(E).index_fill(0, best, 1.0),
        "many ties at the threshold": (random * 4).round() / 4,
        "ties around the threshold": random.clamp(max=random.sort().values[-K // 2]),
        "rising": e / 8,
        "falling": -e / 8,
        "in one lane": one_lane,
        "one far off": random.index_fill(0, best[:1], 1e30),
        "over all magnitudes": random.sign() * (random * 20).exp(),
        "NaN": torch.full((E,), torch.nan),
        "NaN but K - 1": torch.full((E,), torch.nan).index_copy(0, best[1:], random[best[1:]]),
        "NaN but K": torch.full((E,), torch.nan).index_copy(0, best, random[best]),
        "every other NaN": torch.where(e % 2 == 0, torch.nan, random),
        "-inf but K - 1": torch.full((E,), -torch.inf).index_copy(0, best[1:], random[best[1:]]),
        "-inf": torch.full((E,), -torch.inf),
        "inf": torch.full((E,), torch.inf),
        "K + 3 inf": random.index_fill(0, torch.randperm(E, generator=g)[: K + 3], torch.inf),
        "inf, -inf and NaN": torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]).repeat(E)[:E],
        "signed zeros": torch.tensor([0.0, -0.0, -1.0]).repeat(E)[:E],
    }


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("top_k,experts", [(22, 512), (13, 300), (11, 257), (22, 24), (32, 1024), (8, 9)])
def test_hard_rows(target, top_k, experts, biased):
    """Each among others in the same program of a kernel and, of many experts, alone in a program of four."""
    rows = torch.stack(list(hard_rows(experts, top_k).values())).to(target.dtype)
    logits = torch.cat([rows, rows[:1], rows.repeat_interleave(4, 0)]) if 256 < experts <= 512 else rows
    bias = (torch.arange(experts) % 3 / 64) if biased else None
    expected = naive_indices(logits.float() if bias is None else logits.float() + bias, top_k)
    of_bias = None if bias is None else bias.to(target.device)
    how = {"scoring": "sigmoid", "score_after_topk": True, "selection_bias_E": of_bias}
    weights, indices = topk_route(logits.to(target.device), top_k, **how)
    wrong = (indices.cpu() != expected).any(-1).nonzero().flatten().tolist()
    assert not wrong, [(logits[i], indices[i], expected[i]) for i in wrong[:1]]
    truth = logits.float().gather(1, expected).double().sigmoid()
    torch.testing.assert_close(weights.cpu().double(), truth, rtol=1e-5, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_extreme_logits(target, scoring):
    """Scores that underflow or saturate have finite weights and gradients, the true ones."""
    row = [-95.0, -60.0, -20.0, -5.0, -1e-3, 1e-3, 5.0, 20.0, 60.0, 95.0]
    logits = torch.tensor([row, row[::-1]], device=target.device, dtype=target.dtype).requires_grad_()
    weights, indices = topk_route(logits, 10, scoring=scoring)
    assert indices[0].tolist() == list(range(10))[::-1]
    weights.backward(torch.ones_like(weights) if scoring != "softmax" else indices.to(weights.dtype))
    z = logits.detach().double().requires_grad_()
    truth = naive_weights(z, indices, scoring=scoring)
    truth.backward(torch.ones_like(truth) if scoring != "softmax" else indices.double())
    torch.testing.assert_close(weights.double(), truth, rtol=2e-5, atol=1e-38)
    rtol, atol = (2e-5, 1e-7) if target.dtype == torch.float32 else (1e-2, 1e-6)
    torch.testing.assert_close(logits.grad.double(), z.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_dtype(target, weights_dtype):
    if target.device == "cpu" and target.backend == "triton" and weights_dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter is right in float32 only")
    logits = logits_of(20, 16, target).requires_grad_()
    whole, _ = topk_route(logits, 4, renormalize=True)
    weights, _ = topk_route(logits, 4, renormalize=True, weights_dtype=weights_dtype)
    assert torch.equal(weights, whole.to(weights_dtype))
    d = torch.randn_like(weights)
    gradients = [torch.autograd.grad(w, logits, d.to(w.dtype))[0] for w in (weights, whole)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "options", [{}, {"soft_cap": 4.0}, {"scoring": "sqrtsoftplus", "group_score": "max", "num_groups": 2}], ids=str
)
def test_opcheck_of_every_argument(options):
    rule = {"scoring": "softmax", "after": False, "renormalize": True, "epsilon": 1e-20, "scale": 2.0}
    groups = {"num_groups": 1, "top_groups": 1, "group_score": "top2_sum", "losers_zero": True}
    rest = {"min_sum": 0.5, "soft_cap": 0.0, "round_scores": True}
    for table in (rule, groups, rest):
        table.update({key: value for key, value in options.items() if key in table})
    logits, bias = logits_of(9, 16).bfloat16(), torch.randn(16)
    arguments = logits, bias, 3, *rule.values(), *groups.values(), *rest.values(), torch.float16
    torch.library.opcheck(torch.ops.moe_kernels.topk_route.default, arguments)
    weights, indices = torch.ops.moe_kernels.topk_route(*arguments)
    assert weights.dtype == torch.float16
    backward = torch.randn(9, 3), logits, indices, *rule.values(), *rest.values()
    torch.library.opcheck(torch.ops.moe_kernels.topk_route_bwd.default, backward)


def test_rerun_is_bitwise_equal(target):
    logits = logits_of(40, 64, target)
    for a, b in zip(topk_route(logits, 8, renormalize=True), topk_route(logits, 8, renormalize=True)):
        assert bitwise_equal(a, b)
