"""routing_plan: a stable counting sort of the slots by expert, and the tile map, in four launches.

    indices [T, K] -> offsets [E+1], slots [R], positions [T, K], tiles [2, M]

1. count    each program counts its CHUNK of slots per expert (bin E: "no expert")      counts [E+1, chunks]
2. scan     each program turns one expert's column into how many came before each chunk
3. layout   each program adds up the experts before its own: offsets, and its tiles
4. scatter  place = offset of the expert + how many in earlier chunks + how many earlier in the chunk
The rank inside a chunk counts equal ids to the left, pair by pair: no sort, no atomics, one possible result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import Launch, cdiv, launch

_CHUNK = 256  # the ranks are CHUNK^2 comparisons, the counts R / CHUNK columns
_SCAN = 1024  # chunks that the scan handles at once


@triton.jit
def _ids(indices_ptr, o_s, num_slots, num_experts):
    """Expert of each slot; num_experts for "no expert" and for slots past the end."""
    ids = tl.load(indices_ptr + o_s, mask=o_s < num_slots, other=-1)
    return tl.where((ids < 0) | (ids >= num_experts), num_experts, ids).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_chunks"], do_not_specialize_on_alignment=["indices_ptr"])
def count_kernel(indices_ptr, counts_ptr, num_slots, num_chunks, num_experts, CHUNK: tl.constexpr, BINS: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    o_s = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = _ids(indices_ptr, o_s, num_slots, num_experts)
    counts = tl.histogram(ids, BINS, mask=o_s < num_slots)
    o_e = tl.arange(0, BINS)
    tl.store(counts_ptr + o_e.to(tl.int64) * num_chunks + chunk, counts, mask=o_e <= num_experts)


@triton.jit(do_not_specialize=["num_chunks"])
def scan_kernel(counts_ptr, totals_ptr, num_chunks, SCAN: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    before = 0
    for chunk in range(0, num_chunks, SCAN):
        o_c = chunk + tl.arange(0, SCAN)
        p_counts = counts_ptr + expert * num_chunks + o_c
        counts = tl.load(p_counts, mask=o_c < num_chunks, other=0)
        tl.store(p_counts, before + tl.cumsum(counts, 0) - counts, mask=o_c < num_chunks)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, before)


@triton.jit(do_not_specialize=["num_tiles"])
def layout_kernel(
    totals_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles,
    num_experts,
    TILE_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
):
    expert = tl.program_id(0)  # num_experts: the program that ends the offsets and marks the unused tiles
    o_e = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + o_e, mask=o_e < num_experts, other=0)
    earlier = o_e < expert
    offset = tl.sum(tl.where(earlier, totals, 0), 0)
    first_tile = tl.sum(tl.where(earlier, (totals + TILE_ROWS - 1) // TILE_ROWS, 0), 0)
    tl.store(offsets_ptr + expert, offset)
    if expert < num_experts:
        last_tile = first_tile + (tl.load(totals_ptr + expert) + TILE_ROWS - 1) // TILE_ROWS
        label = expert
    else:
        last_tile = num_tiles
        label = -1
    for tile in range(first_tile, last_tile, STEP):
        o_t = tile + tl.arange(0, STEP)
        row = tl.where(label < 0, 0, offset + (o_t - first_tile) * TILE_ROWS)
        tl.store(tiles_ptr + o_t, tl.zeros((STEP,), tl.int32) + label, mask=o_t < last_tile)
        tl.store(tiles_ptr + num_tiles + o_t, row, mask=o_t < last_tile)


@triton.jit(do_not_specialize=["num_slots", "num_chunks"], do_not_specialize_on_alignment=["indices_ptr"])
def scatter_kernel(
    indices_ptr,
    counts_ptr,
    offsets_ptr,
    slots_ptr,
    positions_ptr,
    num_slots,
    num_chunks,
    num_experts,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    i = tl.arange(0, CHUNK)
    ids = _ids(indices_ptr, first + i, num_slots, num_experts)
    rank = tl.zeros((CHUNK,), tl.int32)
    for step in range(0, CHUNK, STEP):
        j = step + tl.arange(0, STEP)
        others = _ids(indices_ptr, first + j, num_slots, num_experts)
        earlier = (others[None, :] == ids[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    before = tl.load(counts_ptr + ids.to(tl.int64) * num_chunks + chunk)
    position = tl.load(offsets_ptr + ids) + before + rank
    inside = first + i < num_slots
    tl.store(slots_ptr + position, first + i, mask=inside)
    tl.store(positions_ptr + first + i, tl.where(ids == num_experts, -1, position), mask=inside)


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

    num_chunks = cdiv(num_slots, _CHUNK)
    counts, totals = empty(num_experts + 1, num_chunks), empty(num_experts + 1)
    bins = max(32, triton.next_power_of_2(num_experts + 1))
    launch(
        device,
        Launch(
            count_kernel,
            (num_chunks,),
            {
                "indices_ptr": indices_TK,
                "counts_ptr": counts,
                "num_slots": num_slots,
                "num_chunks": num_chunks,
                "num_experts": num_experts,
            },
            {"CHUNK": _CHUNK, "BINS": bins},
            4,
            1,
        ),
    )
    launch(
        device,
        Launch(
            scan_kernel,
            (num_experts + 1,),
            {"counts_ptr": counts, "totals_ptr": totals, "num_chunks": num_chunks},
            {"SCAN": _SCAN},
            4,
            1,
        ),
    )
    launch(
        device,
        Launch(
            layout_kernel,
            (num_experts + 1,),
            {
                "totals_ptr": totals,
                "offsets_ptr": offsets_E1,
                "tiles_ptr": tiles_2M,
                "num_tiles": num_tiles,
                "num_experts": num_experts,
            },
            {"TILE_ROWS": block_m, "BINS": bins, "STEP": 128},
            4,
            1,
        ),
    )
    launch(
        device,
        Launch(
            scatter_kernel,
            (num_chunks,),
            {
                "indices_ptr": indices_TK,
                "counts_ptr": counts,
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "positions_ptr": positions_TK,
                "num_slots": num_slots,
                "num_chunks": num_chunks,
                "num_experts": num_experts,
            },
            {"CHUNK": _CHUNK, "STEP": 32},
            4,
            1,
        ),
    )
    return offsets_E1, slots_R, positions_TK, tiles_2M
