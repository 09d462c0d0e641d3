import itertools

import torch
from torch import Tensor


def routing_plan(indices_TK: Tensor, num_experts: int, block_m: int):
    ids_R = indices_TK.reshape(-1)
    # "No expert" sorts behind every expert, so the kept rows are a prefix and the dropped slots a tail.
    ids_R = torch.where((ids_R < 0) | (ids_R >= num_experts), num_experts, ids_R)
    slots_R = torch.argsort(ids_R, stable=True)
    counts_E = torch.bincount(ids_R, minlength=num_experts + 1)[:num_experts]
    offsets_E1 = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])

    positions_R = torch.empty_like(slots_R)
    positions_R[slots_R] = torch.arange(slots_R.numel(), device=slots_R.device)
    positions_R = torch.where(ids_R == num_experts, -1, positions_R)

    experts, rows = _tiles(offsets_E1.tolist(), ids_R.numel(), block_m)
    return (
        offsets_E1.int(),
        slots_R.int(),
        positions_R.int().reshape(indices_TK.shape),
        slots_R.new_tensor([experts, rows], dtype=torch.int32),
    )


def _tiles(offsets: list[int], num_slots: int, block_m: int) -> tuple[list[int], list[int]]:
    """An expert's tiles begin at an even place. An odd number leaves the last one to wait for that of the next expert
    with an odd number, and both come after that one's others."""
    tiles, waiting = [], []
    for expert, (first, end) in enumerate(itertools.pairwise(offsets)):
        own = [(expert, row) for row in range(first, end, block_m)]
        if len(own) % 2:
            waiting.append(own.pop())
        tiles += own
        if len(waiting) == 2:
            tiles += waiting
            waiting = []
    tiles += waiting
    tiles += [(-1, 0)] * (num_slots // block_m + min(num_slots, len(offsets) - 1) - len(tiles))
    return [expert for expert, _ in tiles], [row for _, row in tiles]
