"""routing_plan: expert indices -> a stable counting sort of the slots by expert, and the map of its tiles.

    offsets[e]   = number of slots of experts below e                              [E+1]
    row[r]       = offsets[indices[r]] + |{r' < r : indices[r'] = indices[r]}|     dropped slots: after the kept ones
    slots[row]   = r                                                               [R]
    positions[r] = row, or -1 where r is dropped                                   [T, K]
    tiles        = per TILE_ROWS rows of an expert: the expert, its first row      [2, M]

R is cut into blocks of BLOCK slots, one program a block:

    count    the block's histogram over the experts                                counts [E, blocks]
    scan     one program an expert: inclusive sum over the blocks, in place         totals [E]
    scatter  sorts the block's keys (expert, slot): row = place in the sorted block + slots of other blocks that come
             first. Every program scans the totals for itself: E words, cheaper than a launch.
             Programs past the blocks write offsets and tiles.

One pass of a radix sort whose digit is the expert. Ranks among equals come from a bitonic sort of the block: its work
grows with log2(BLOCK)^2 a slot, where comparing all pairs grows with BLOCK and a cumulative one-hot with E. Keys are
distinct and blocks share no counter: one possible result, whatever the order of the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import Launch, cdiv, launch

_BLOCK = 512  # 256 programs at R = 131072, two an SM
_WARPS = 4  # 4 keys a thread: exchanges in flight to hide each other's latency, few between warps
_SCAN = 512  # blocks that the scan handles at once
_TILES = 128  # tiles that a program maps


@triton.jit
def _load_ids(indices_ptr, o_s, num_slots, num_experts):
    """Expert of each slot; num_experts for "no expert" and for slots past the end."""
    ids = tl.load(indices_ptr + o_s, mask=o_s < num_slots, other=-1)
    return tl.where((ids < 0) | (ids >= num_experts), num_experts, ids).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"], do_not_specialize_on_alignment=["indices_ptr"])
def count_kernel(indices_ptr, counts_ptr, num_slots, num_blocks, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    ids = _load_ids(indices_ptr, block * BLOCK + tl.arange(0, BLOCK), num_slots, num_experts)
    counts = tl.histogram(ids, BINS, mask=ids < num_experts)
    o_e = tl.arange(0, BINS)
    tl.store(counts_ptr + o_e.to(tl.int64) * num_blocks + block, counts, mask=o_e < num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(counts_ptr, totals_ptr, num_blocks, SCAN: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, num_blocks, SCAN):
        o_b = first + tl.arange(0, SCAN)
        p_counts = counts_ptr + expert * num_blocks + o_b
        counts = tl.load(p_counts, mask=o_b < num_blocks, other=0)
        tl.store(p_counts, before + tl.cumsum(counts, 0), mask=o_b < num_blocks)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, before)


@triton.jit
def _bit(axis: tl.constexpr, DIMS: tl.constexpr):
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (DIMS - 1 - axis)) != 0


@triton.jit
def _exchange(x, stage: tl.constexpr, axis: tl.constexpr, DIMS: tl.constexpr):
    """One step of a bitonic sort: each pair along an axis of the cube [2] * DIMS in order."""
    other = tl.sum(x, axis, keep_dims=True) - x  # the neighbour along the axis
    upper = _bit(axis, DIMS)
    if stage < DIMS:  # runs of 2**stage keys ascend and descend in turn: two of them are bitonic
        upper = upper ^ _bit(DIMS - 1 - stage, DIMS)
    return tl.where(upper, tl.maximum(x, other), tl.minimum(x, other))


@triton.jit
def _sort(x, DIMS: tl.constexpr):
    """tl.sort of 2**DIMS keys in three quarters of its instructions, since a minimum needs no compare and select, and
    in a tenth of its time in the interpreter, where sums are numpy's and xors a loop."""
    x = tl.reshape(x, [2] * DIMS)
    for stage in tl.static_range(1, DIMS + 1):
        for step in tl.static_range(stage):
            x = _exchange(x, stage, DIMS - stage + step, DIMS)
    return tl.reshape(x, [1 << DIMS])


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _write_tiles(
    tiles_ptr, first_tile, num_tiles, totals, offsets, num_experts, TILES: tl.constexpr, ROWS: tl.constexpr
):
    """An expert's tiles begin at an even place. An odd number leaves the last one to wait for that of the next expert
    with an odd number, and both come after that one's others."""
    tiles = (totals + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    before = ends - tiles  # odd where a tile waits
    # A tile's expert is the number of experts but the first that begin at or before it.
    o_e = tl.arange(0, totals.shape[0])
    begins = ends & ~1  # of the next expert
    begun = (o_e < num_experts - 1) & (begins < first_tile + TILES)
    experts = tl.cumsum(tl.histogram(tl.maximum(begins - first_tile, 0), TILES, mask=begun), 0)

    o_t = first_tile + tl.arange(0, TILES)
    first = tl.gather(before, experts, 0)
    within = o_t - (first & ~1)
    paired = tl.gather(tiles, experts, 0) & ~1
    waited = (within == paired) & (first % 2 == 1)
    last_odd = tl.associative_scan(tl.where(tiles % 2 == 1, o_e, 0), 0, _maximum)
    experts_of = tl.where(waited, tl.gather(last_odd, tl.maximum(experts - 1, 0), 0), experts)
    within = tl.where(within < paired, within, tl.gather(tiles, experts_of, 0) - 1)
    rows = tl.gather(offsets, experts_of, 0) + within * ROWS
    used = o_t < tl.sum(tiles, 0)
    tl.store(tiles_ptr + o_t, tl.where(used, experts_of, -1), mask=o_t < num_tiles)
    tl.store(tiles_ptr + num_tiles + o_t, tl.where(used, rows, 0), mask=o_t < num_tiles)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_tiles"], do_not_specialize_on_alignment=["indices_ptr"])
def scatter_kernel(
    indices_ptr,
    counts_ptr,
    totals_ptr,
    offsets_ptr,
    slots_ptr,
    positions_ptr,
    tiles_ptr,
    num_slots,
    num_blocks,
    num_tiles,
    num_experts,
    LOG_BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    block = tl.program_id(0)
    o_e = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + o_e, mask=o_e < num_experts, other=0)

    if block < num_blocks:
        first = block.to(tl.int64) * BLOCK
        i = tl.arange(0, BLOCK)
        ids = _load_ids(indices_ptr, first + i, num_slots, num_experts)
        inside = o_e < num_experts
        p_counts = counts_ptr + o_e.to(tl.int64) * num_blocks + block
        until = tl.load(p_counts, mask=inside, other=0)
        before = tl.load(p_counts - 1, mask=inside & (block > 0), other=0)
        # What comes between a slot's place in the sorted block and its row is all in other blocks: the slots of the
        # experts below its own and the earlier ones of its own; for a dropped slot every kept one, the earlier dropped.
        others = totals - until + before
        shift = tl.cumsum(others, 0) - others + before
        shift_dropped = tl.sum(totals - until, 0) + first.to(tl.int32)

        keys = _sort(ids * BLOCK + i, LOG_BLOCK)  # at most 4097 * BLOCK
        ids, slots = keys // BLOCK, first + keys % BLOCK
        kept = ids < num_experts
        rows = i + tl.where(kept, tl.gather(shift, tl.where(kept, ids, 0), 0), shift_dropped)
        tl.store(slots_ptr + rows, slots, mask=slots < num_slots)
        tl.store(positions_ptr + slots, tl.where(kept, rows, -1), mask=slots < num_slots)
    else:
        ends = tl.cumsum(totals, 0)
        first_tile = (block - num_blocks) * TILES
        if first_tile == 0:
            tl.store(offsets_ptr, 0)
            tl.store(offsets_ptr + 1 + o_e, ends, mask=o_e < num_experts)
        _write_tiles(tiles_ptr, first_tile, num_tiles, totals, ends - totals, num_experts, TILES, TILE_ROWS)


def routing_plan(indices_TK: Tensor, num_experts: int, block_m: int):
    num_slots, device = indices_TK.numel(), indices_TK.device
    num_tiles = num_slots // block_m + min(num_slots, num_experts)
    indices_TK = indices_TK.contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    offsets_E1, slots_R, tiles_2M = empty(num_experts + 1), empty(num_slots), empty(2, num_tiles)
    positions_TK = empty(*indices_TK.shape)
    if num_slots == 0:
        return offsets_E1.zero_(), slots_R, positions_TK, tiles_2M

    num_blocks = cdiv(num_slots, _BLOCK)
    counts, totals = empty(num_experts, num_blocks), empty(num_experts)
    bins = max(32, triton.next_power_of_2(num_experts))
    launch(
        device,
        Launch(
            count_kernel,
            (num_blocks,),
            {
                "indices_ptr": indices_TK,
                "counts_ptr": counts,
                "num_slots": num_slots,
                "num_blocks": num_blocks,
                "num_experts": num_experts,
            },
            {"BLOCK": _BLOCK, "BINS": bins},
            _WARPS,
            1,
        ),
    )
    launch(
        device,
        Launch(
            scan_kernel,
            (num_experts,),
            {"counts_ptr": counts, "totals_ptr": totals, "num_blocks": num_blocks},
            {"SCAN": _SCAN},
            _WARPS,
            1,
        ),
    )
    launch(
        device,
        Launch(
            scatter_kernel,
            (num_blocks + cdiv(num_tiles, _TILES),),
            {
                "indices_ptr": indices_TK,
                "counts_ptr": counts,
                "totals_ptr": totals,
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "positions_ptr": positions_TK,
                "tiles_ptr": tiles_2M,
                "num_slots": num_slots,
                "num_blocks": num_blocks,
                "num_tiles": num_tiles,
                "num_experts": num_experts,
            },
            {"LOG_BLOCK": _BLOCK.bit_length() - 1, "BINS": bins, "TILES": _TILES, "TILE_ROWS": block_m},
            _WARPS,
            1,
        ),
    )
    return offsets_E1, slots_R, positions_TK, tiles_2M
