"""The routings that layers are timed with."""

import pytest
import torch

from moe_kernels.bench.shapes import (
    ALL_SHAPES,
    DEFAULT_SHAPES,
    OTHERS,
    ROUTINGS,
    ROW_SHAPES,
    SHAPES,
    Kind,
    Shape,
    routing,
    zipf_ranks,
)

SHAPE = Shape("small", 4000, 8, 8, 32, 4)


def counts(kind: str) -> list[int]:
    return torch.bincount(routing(kind, SHAPE, "cpu")[1].flatten(), minlength=SHAPE.E).tolist()


@pytest.mark.parametrize("kind", ROUTINGS)
def test_experts_of_a_token_are_distinct_and_weights_sum_to_one(kind):
    weights, indices = routing(kind, SHAPE, "cpu")
    assert weights.shape == indices.shape == (SHAPE.T, SHAPE.K)
    assert weights.dtype == torch.bfloat16 and indices.dtype == torch.int64
    assert indices.min() >= 0 and indices.max() < SHAPE.E
    assert (indices.sort(-1).values.diff() > 0).all()
    assert torch.allclose(weights.float().sum(-1), torch.ones(SHAPE.T), atol=0.02)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_a_seed_is_a_routing(kind):
    first, again, other = (routing(kind, SHAPE, "cpu", seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_uniform_gives_every_expert_its_share():
    share = SHAPE.rows / SHAPE.E
    assert all(abs(count - share) < 0.2 * share for count in counts("uniform"))


def test_zipf_falls_as_the_rank_to_the_minus_one_point_two():
    ranks, counted = zipf_ranks(SHAPE.E).tolist(), counts("zipf")
    assert sorted(ranks) == list(range(1, SHAPE.E + 1))
    found = [counted[ranks.index(rank)] for rank in range(1, SHAPE.E + 1)]
    assert found[0] > found[3] > found[10] > found[31] > 0
    # In the tail drawing without replacement changes little, and counts are in the ratio of the probabilities.
    assert found[15] / found[31] == pytest.approx(2**1.2, rel=0.2)


@pytest.mark.parametrize("experts", sorted({shape.E for shape in SHAPES.values()}))
def test_zipf_does_not_put_the_longest_experts_first(experts):
    ranks = zipf_ranks(experts)
    assert torch.equal(ranks, zipf_ranks(experts)), "the same in every run"
    assert ranks.argmin() > 0 and not torch.equal(ranks, ranks.sort().values)


def test_one_hot_sends_every_token_to_the_last_expert_and_the_rest_evenly():
    *rest, hot = counts("one-hot")
    share = (SHAPE.rows - SHAPE.T) / (SHAPE.E - 1)
    assert hot == SHAPE.T
    assert all(abs(count - share) < 0.2 * share for count in rest)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"must be one of uniform, zipf, one-hot, got 'skewed'"):
        routing("skewed", SHAPE, "cpu")


def test_flops_of_the_paper():
    assert SHAPES["qwen3-30b"].forward_flops == 6 * 16384 * 8 * 768 * 2048
    assert SHAPES["qwen3-30b"]._replace(kind=Kind("relu2")).forward_flops == 4 * 16384 * 8 * 768 * 2048


def test_names():
    assert set(DEFAULT_SHAPES) <= set(ALL_SHAPES) < SHAPES.keys()
    assert set(ROW_SHAPES) < SHAPES.keys() | OTHERS.keys() and not SHAPES.keys() & OTHERS.keys()
    for name, shape in (SHAPES | OTHERS).items():
        assert shape.name == name and shape.rows % shape.E == 0, "torch.bmm on equal groups would leave rows out"


def test_sizes_of_layers_that_are_not_qwen3s_are_those_of_the_models():
    from moe_kernels.bench.family_models import MODELS

    for name, shape in OTHERS.items():
        assert shape == MODELS[name].experts_shape(shape.T)._replace(kind=shape.kind)
        experts = MODELS[name].build("meta").experts
        kind = shape.kind
        assert (kind.gated, kind.transposed, kind.biases) == (experts.has_gate, experts.is_transposed, experts.has_bias)
        up = experts.gate_up_proj if kind.gated else experts.up_proj
        assert tuple(up.mT.shape if kind.transposed else up.shape) == (shape.E, shape.N, shape.D)
    gpt_oss = MODELS["gpt-oss-20b"].build("meta").experts
    assert (gpt_oss.alpha, gpt_oss.limit) == OTHERS["gpt-oss-20b"].kind.options[:2]
