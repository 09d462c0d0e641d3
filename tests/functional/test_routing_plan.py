import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moe_kernels.functional import RoutingPlan, routing_plan
from moe_kernels.functional.routing_plan import MAX_BLOCK_M, MIN_BLOCK_M
from moe_kernels.ops.routing_plan import max_tiles

BLOCKS = (16, 32, 64, 128)


@st.composite
def routings(draw):
    T, K, E = draw(st.integers(0, 60)), draw(st.integers(1, 9)), draw(st.integers(1, 20))
    # A few ids drawn often, so that hot experts, repeats within a row and "no expert" all turn up
    ids = st.sampled_from(sorted(draw(st.sets(st.integers(-2, E + 2), min_size=1))))
    rows = draw(st.lists(st.lists(ids, min_size=K, max_size=K), min_size=T, max_size=T))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.tensor(rows, dtype=dtype).reshape(T, K), E, draw(st.sampled_from([None, *BLOCKS]))


# The poison fixture is function-scoped: it stays patched over all examples, which is what is wanted.
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(routings())
def test_invariants(routing):
    indices, E, block_m = routing
    plan = routing_plan(indices, E, block_m=block_m)
    check_invariants(plan, indices, E)


def check_invariants(plan, indices, E):
    flat, R = indices.flatten().tolist(), indices.numel()
    offsets, slots, positions = plan.offsets_E1.tolist(), plan.slots_R.tolist(), plan.positions_TK.flatten().tolist()
    kept = [slot for slot in range(R) if 0 <= flat[slot] < E]

    assert offsets[0] == 0 and offsets[-1] == len(kept) and len(offsets) == E + 1
    assert plan.tokens_per_expert_E.tolist() == [flat.count(e) for e in range(E)]
    assert sorted(slots) == list(range(R)), "a permutation of all slots, the dropped ones last"
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        mine = slots[start:end]
        assert all(flat[slot] == e for slot in mine)
        assert mine == sorted(mine), "slots keep their order inside an expert"

    assert plan.positions_TK.shape == indices.shape
    for slot, position in enumerate(positions):
        if 0 <= flat[slot] < E:
            assert slots[position] == slot, "positions invert slots"
        else:
            assert position == -1

    tiles = plan.tiles_2M.T.tolist()
    assert len(tiles) == max_tiles(R, E, plan.block_m)
    covered = []
    for e, first in tiles:
        if e >= 0:
            assert first < offsets[e + 1], "a used tile has rows"
            covered += [(e, row) for row in range(first, min(first + plan.block_m, offsets[e + 1]))]
    rows = [(e, row) for e, (start, end) in enumerate(itertools.pairwise(offsets)) for row in range(start, end)]
    assert sorted(covered) == rows, "the tiles cover each expert's rows exactly once"

    used = [tile for tile in tiles if tile[0] >= 0]
    assert tiles[: len(used)] == used, "unused tiles come last"
    for pair in zip(used[::2], used[1::2]):
        if pair[0][0] != pair[1][0]:
            for e, first in pair:
                last = first + plan.block_m >= offsets[e + 1]
                assert last and (first - offsets[e]) // plan.block_m % 2 == 0, (
                    "of two experts: last ones of an odd number"
                )


@pytest.mark.parametrize(
    "slots,experts,block_m",
    [(8, 128, 16), (128 * 16, 128, 16), (128 * 17, 128, 32), (16384 * 8, 128, 128), (2**20, 2, 128), (0, 4, 16)],
)
def test_default_block_m(slots, experts, block_m):
    plan = routing_plan(torch.zeros(slots, 1, dtype=torch.int32), experts)
    assert plan.block_m == block_m
    assert MIN_BLOCK_M <= plan.block_m <= MAX_BLOCK_M


def test_a_plan_is_what_it_says():
    plan = routing_plan(torch.tensor([[1, 0], [1, 3]]), 3, block_m=16)
    assert isinstance(plan, RoutingPlan)
    assert (plan.num_experts, plan.top_k, plan.block_m) == (3, 2, 16)
    assert plan.offsets_E1.tolist() == [0, 1, 3, 3]
    assert plan.slots_R.tolist() == [1, 0, 2, 3]
    assert plan.positions_TK.tolist() == [[1, 0], [2, -1]]
