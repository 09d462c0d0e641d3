import itertools

import pytest
import torch

from moe_kernels.functional import topk_route
from tests.helpers import RELATIVE_L2, Target, assert_close, bitwise_equal

OP = "topk_route"
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
]
TABLE = pytest.mark.parametrize("how,experts", [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])


def naive_indices(choice_TE, top_k, num_groups=1, top_groups=1):
    """Best first, ties to the lowest index, a NaN last: Python's sort on (-score, index)."""
    rows = []
    for row in choice_TE.tolist():
        row = [-torch.inf if score != score else score for score in row]
        size = len(row) // num_groups
        groups = range(num_groups)
        if num_groups > 1:
            merit = {g: sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in groups}
            groups = sorted(groups, key=lambda g: (-merit[g], g))[:top_groups]
        allowed = [e for g in groups for e in range(g * size, (g + 1) * size)]
        rows.append(sorted(allowed, key=lambda e: (-row[e], e))[:top_k])
    return torch.tensor(rows).reshape(-1, top_k)


def naive_weights(
    logits, indices, scoring="softmax", score_after_topk=False, renormalize=False, epsilon=0.0, scale=1.0
):
    z = logits.gather(1, indices) if score_after_topk else logits
    p = torch.exp(z - z.logsumexp(-1, keepdim=True)) if scoring == "softmax" else 1 / (1 + torch.exp(-z))
    w = p if score_after_topk else p.gather(1, indices)
    return (w / (w.sum(-1, keepdim=True) + epsilon) if renormalize else w) * scale


def split(how):
    groups = {key: how[key] for key in ("top_k", "num_groups", "top_groups") if key in how}
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
    score = z.softmax(-1) if scoring.get("scoring", "softmax") == "softmax" else z.sigmoid()
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


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
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
def test_bad_logits_still_choose_distinct_experts(target, scoring, score_after_topk, groups, bad):
    T, E, K = 40, 16, 6
    logits = logits_of(T, E, target)
    generator = torch.Generator().manual_seed(0)
    for t in range(T):  # from one bad entry to a whole bad row
        where = torch.randperm(E, generator=generator)[: 1 + t * E // T]
        values = list(itertools.islice(itertools.cycle(bad), len(where)))
        logits[t, where.to(logits.device)] = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    logits[-1] = bad[0]
    how = {"scoring": scoring, "score_after_topk": score_after_topk}
    _, indices = topk_route(logits, K, num_groups=groups[0], top_groups=groups[1], **how)
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


def test_rerun_is_bitwise_equal(target):
    logits = logits_of(200, 64, target)
    for a, b in zip(topk_route(logits, 8, renormalize=True), topk_route(logits, 8, renormalize=True)):
        assert bitwise_equal(a, b)
