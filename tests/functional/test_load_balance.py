"""The update of the selection bias against the rule written out, alone and over a group; the load's metrics."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_kernels.functional import expert_load, update_selection_bias_

BIAS = [0.5, -0.25, 1.0, 0.0]
#: counts -> direction of each bias: below the mean up, above it down
RULE = {
    "mixed": ([4, 0, 10, 2], [0, 1, -1, 1]),
    "even": ([3, 3, 3, 3], [0, 0, 0, 0]),
    "no tokens": ([0, 0, 0, 0], [0, 0, 0, 0]),
    "one expert has all": ([0, 8, 0, 0], [1, -1, 1, 1]),
    "mean is no integer": ([1, 1, 1, 2], [1, 1, 1, -1]),
    "beyond what fp32 can tell apart": ([2**40, 2**40, 2**40 + 1, 2**40 - 1], [0, 0, -1, 1]),
}


@pytest.mark.parametrize("counts, signs", RULE.values(), ids=RULE)
@pytest.mark.parametrize("rate", [1e-3, 0.5, 0])
def test_rule(counts, signs, rate):
    bias = torch.tensor(BIAS)
    counts = torch.tensor(counts)
    before = counts.clone()
    assert update_selection_bias_(bias, counts, rate=rate) is counts
    expected = torch.tensor(BIAS) + torch.tensor(signs) * rate
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-7)
    assert torch.equal(counts, before)


def test_layers_are_updated_apart():
    counts = torch.randint(0, 100, (3, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    together = torch.zeros(3, 8)
    update_selection_bias_(together, counts)
    for row, row_counts in zip(together, counts):
        alone = torch.zeros(8)
        update_selection_bias_(alone, row_counts)
        assert torch.equal(row, alone)
    assert torch.equal(together, 1e-3 * (counts.double().mean(-1, keepdim=True) - counts).sign().float())


def test_bf16_needs_a_master():
    """Around 1 a step of 1e-3 is less than half of bf16's spacing."""
    counts = torch.tensor([0, 8])
    alone = torch.ones(2, dtype=torch.bfloat16)
    bias, master = alone.clone(), torch.ones(2)
    for _ in range(100):
        update_selection_bias_(alone, counts)
        update_selection_bias_(bias, counts, master_E=master)
    assert alone.tolist() == [1.0, 1.0]
    torch.testing.assert_close(master, torch.tensor([1.1, 0.9]))
    assert torch.equal(bias, master.bfloat16())


def test_requires_no_grad():
    bias = torch.nn.Parameter(torch.zeros(2))
    update_selection_bias_(bias, torch.tensor([0, 1]))
    assert bias.grad_fn is None and bias.tolist() == [pytest.approx(1e-3), pytest.approx(-1e-3)]


def _rank(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        counts = torch.tensor([[8, 0, 3, 1], [0, 4, 4, 4]][rank])  # together [8, 4, 7, 5], mean 6
        bias = torch.zeros(4)
        summed = update_selection_bias_(bias, counts, rate=0.5, group=dist.group.WORLD)
        results[rank] = (bias.tolist(), summed.tolist(), counts.tolist())
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_two_ranks(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (tmp_path / "store", results), nprocs=2)
        results = dict(results)
    for rank, own in enumerate([[8, 0, 3, 1], [0, 4, 4, 4]]):
        assert results[rank] == ([-0.5, 0.5, -0.5, 0.5], [8, 4, 7, 5], own)


def test_metrics_by_hand():
    load = expert_load(torch.tensor([4, 0, 10, 2]))
    shares = [4 / 16, 10 / 16, 2 / 16]
    assert load.max_over_mean.item() == 2.5
    assert load.min_over_mean.item() == 0
    assert load.entropy.item() == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))


def test_metrics_of_extremes():
    load = expert_load(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]]))
    for values, (even, one) in ((load.max_over_mean, (1, 4)), (load.min_over_mean, (1, 0)), (load.entropy, (1, 0))):
        assert values.dtype == torch.float32 and values[:2].tolist() == [pytest.approx(even), pytest.approx(one)]
        assert values[2].isnan()


@pytest.mark.parametrize(
    "argument, change",
    [
        ("bias", {"bias_E": torch.zeros(4, dtype=torch.int64)}),
        ("bias", {"bias_E": [0.0]}),
        ("counts", {"counts_E": torch.zeros(4)}),
        ("counts", {"counts_E": torch.zeros(3, dtype=torch.int64)}),
        ("counts", {"counts_E": torch.tensor(3)}),
        ("counts", {"counts_E": torch.zeros(4, dtype=torch.int64, device="meta")}),
        ("rate", {"rate": -1e-3}),
        ("rate", {"rate": math.nan}),
        ("rate", {"rate": "fast"}),
        ("master", {"master_E": torch.zeros(4, dtype=torch.bfloat16)}),
        ("master", {"master_E": torch.zeros(3)}),
        ("group", {"group": "world"}),
    ],
)
def test_errors_name_the_argument(argument, change):
    arguments = {"bias_E": torch.zeros(4), "counts_E": torch.tensor([4, 0, 0, 0])} | change
    with pytest.raises(ValueError, match=f": {argument} must be"):
        update_selection_bias_(**arguments)
    bias = arguments["bias_E"]
    assert not isinstance(bias, torch.Tensor) or not bias.any(), "written to before the error"


@pytest.mark.parametrize("counts", [torch.zeros(4), torch.tensor([3]), torch.tensor(3), [1, 2]])
def test_metrics_errors(counts):
    with pytest.raises(ValueError, match="expert_load: counts must be"):
        expert_load(counts)
