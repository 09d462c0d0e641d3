import pytest
import torch

from moe_kernels import functional
from moe_kernels.ops.routing_plan import max_tiles
from tests.helpers import Case, bitwise_equal, make_indices, naive_plan

OP = "routing_plan"

CASES = [
    # T, K, E, -, -, -, routing, block_m
    Case(63, 2, 8, 0, 0, routing="uniform", block_m=16),
    Case(1, 1, 1, 0, 0, routing="uniform", block_m=16),
    Case(1, 8, 128, 0, 0, routing="uniform", block_m=16),
    Case(0, 2, 8, 0, 0, routing="duplicates", block_m=64),
    Case(257, 8, 128, 0, 0, routing="uniform", block_m=32),
    Case(200, 2, 8, 0, 0, routing="all_to_one", block_m=64),
    Case(129, 3, 9, 0, 0, routing="empty", block_m=128),
    Case(130, 4, 12, 0, 0, routing="sentinels", block_m=64),
    Case(77, 6, 5, 0, 0, routing="duplicates", block_m=16),
    Case(33, 2, 4, 0, 0, routing="all_dropped", block_m=64),
    Case(300, 1, 513, 0, 0, routing="uniform", block_m=128),  # more experts than rows, and not a power of two
    Case(64, 2, 2, 0, 0, routing="uniform", block_m=64),  # experts that fill their tiles exactly
    Case(256, 8, 40, 0, 0, routing="sentinels", block_m=16),  # as many slots as a block in CUDA C++ sorts alone
    Case(683, 3, 40, 0, 0, routing="duplicates", block_m=64),  # one more
]
NAMES = ("offsets", "slots", "positions", "tiles")


def indices_of(case, device):
    return make_indices(case, torch.Generator().manual_seed(case.T)).to(device)


def assert_same_plan(actual, expected):
    """Equal, but for the order of the dropped slots and the row of an unused tile, which mean nothing."""
    offsets, slots, positions, tiles = actual
    kept = int(expected.offsets_E1[-1])
    assert torch.equal(offsets, expected.offsets_E1)
    assert torch.equal(slots[:kept], expected.slots_R[:kept])
    assert torch.equal(slots[kept:].sort().values, expected.slots_R[kept:].sort().values)
    assert torch.equal(positions, expected.positions_TK)
    assert torch.equal(tiles[0], expected.tiles_2M[0])
    used = tiles[0] >= 0
    assert torch.equal(tiles[1][used], expected.tiles_2M[1][used])


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_a_python_sort(target, case, ids):
    indices = indices_of(case, target.device).to(ids)
    actual = torch.ops.moe_kernels.routing_plan(indices, case.E, case.block_m)
    for name, tensor in zip(NAMES, actual):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous(), name
    assert actual[3].shape == (2, max_tiles(indices.numel(), case.E, case.block_m))
    assert_same_plan(actual, naive_plan(indices, case.E, case.block_m))


def test_strided_indices(target):
    case = Case(70, 3, 8, 0, 0)
    wide = indices_of(case._replace(K=6, routing="duplicates"), target.device)
    for indices in (wide[:, ::2], wide[:, :3], wide[:, :3].T.contiguous().T):
        assert not indices.is_contiguous()
        actual = torch.ops.moe_kernels.routing_plan(indices, case.E, case.block_m)
        assert_same_plan(actual, naive_plan(indices.contiguous(), case.E, case.block_m))


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_more_slots_than_int32_counts(ids):
    """A tensor without memory has as many; one slot less will do."""
    indices = torch.empty(2**28, 8, dtype=ids, device="meta")
    message = (
        r"routing_plan: expert_indices must be smaller than 2\*\*31 slots, got a int.. tensor of shape \[268435456, 8"
    )
    for plan in (torch.ops.moe_kernels.routing_plan, functional.routing_plan):
        with pytest.raises(ValueError, match=message):
            plan(indices, 128, block_m=128)
    slots = 2**31 - 1
    offsets, slots_R, positions, tiles = torch.ops.moe_kernels.routing_plan(indices.view(-1, 1)[:slots], 128, 128)
    assert offsets.shape == (129,) and slots_R.shape == (slots,) and positions.shape == (slots, 1)
    assert tiles.shape == (2, slots // 128 + 128)


def test_rerun_is_bitwise_equal(target):
    case = Case(511, 4, 16, 0, 0, routing="sentinels")
    indices = indices_of(case, target.device)
    first, second = (torch.ops.moe_kernels.routing_plan(indices, case.E, case.block_m) for _ in range(2))
    assert all(bitwise_equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("routing", ["sentinels", "duplicates", "all_to_one", "all_dropped"])
def test_many_small_blocks(target, routing, monkeypatch):
    """More blocks than Triton's scan takes at once and more tiles than one program maps, without 2**18 slots."""
    kernels = pytest.importorskip("moe_kernels.backends.triton.routing_plan")
    for name, size in {"_BLOCK": 32, "_SCAN": 16, "_TILES": 32}.items():
        monkeypatch.setattr(kernels, name, size)
    case = Case(201, 4, 40, 0, 0, routing=routing, block_m=16)
    indices = indices_of(case, target.device)
    actual = torch.ops.moe_kernels.routing_plan(indices, case.E, case.block_m)
    assert_same_plan(actual, naive_plan(indices, case.E, case.block_m))


@pytest.mark.gpu
@pytest.mark.parametrize("sms", [1, 2, 5, 31])
@pytest.mark.parametrize("E", [5, 128, 2000, 4096])
def test_few_multiprocessors(sms, E, monkeypatch):
    """Long chunks in CUDA C++, which are ranked twice: as few blocks as so small a GPU would have."""
    from moe_kernels import backends, use_backend

    reason = backends.why_not("cuda", OP, backends.Problem(torch.device("cuda"), None, ()))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr("moe_kernels.backends.cuda.routing_plan.num_sms", lambda device: sms)
    indices = torch.randint(-1, E + 1, (13_001, 7), device="cuda")
    with use_backend("cuda"):
        actual = torch.ops.moe_kernels.routing_plan(indices, E, 16)
    assert_same_plan([each.cpu() for each in actual], naive_plan(indices.cpu(), E, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [2**18, 2**21], ids=["2**21", "2**24"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_many_slots(backend, T):
    """More slots than any single block sorts, the larger with more in a block than 16 bits count."""
    from moe_kernels import backends, use_backend

    reason = backends.why_not(backend, OP, backends.Problem(torch.device("cuda"), None, ()))
    if reason is not None:
        pytest.skip(reason)
    E = 128
    indices = torch.randint(0, E, (T, 8), device="cuda", dtype=torch.int32)
    with use_backend(backend):
        offsets, slots, positions, _ = torch.ops.moe_kernels.routing_plan(indices, E, 128)
    order = indices.flatten().argsort(stable=True)
    assert torch.equal(slots.long(), order)
    assert torch.equal(offsets[1:].long(), indices.flatten().bincount(minlength=E).cumsum(0))
    assert torch.equal(positions.flatten()[order].long(), torch.arange(order.numel(), device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("E", [1, 128, 384, 4096])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_many_experts_and_dropped_slots(backend, E):
    """A size of every day, no multiple of any block, against the reference."""
    from moe_kernels import backends, use_backend
    from moe_kernels.functional import RoutingPlan

    reason = backends.why_not(backend, OP, backends.Problem(torch.device("cuda"), None, ()))
    if reason is not None:
        pytest.skip(reason)
    indices = torch.randint(-1 - E // 50, E + 2, (13_001, 7), device="cuda")
    with use_backend("reference"):
        expected = torch.ops.moe_kernels.routing_plan(indices, E, 64)
    with use_backend(backend):
        actual = torch.ops.moe_kernels.routing_plan(indices, E, 64)
    assert_same_plan(actual, RoutingPlan(*expected, 64))
