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

    return (
        offsets_E1.int(),
        slots_R.int(),
        positions_R.int().reshape(indices_TK.shape),
        _tiles(counts_E, offsets_E1, ids_R.numel(), block_m),
    )


def _tiles(counts_E: Tensor, offsets_E1: Tensor, num_slots: int, block_m: int) -> Tensor:
    """An expert's tiles begin at an even place. An odd number leaves the last one to wait for that of the next expert
    with an odd number, and both come after that one's others."""
    num_experts = counts_E.numel()
    tiles_E = (counts_E + block_m - 1) // block_m
    before_E = tiles_E.cumsum(0) - tiles_E  # odd where a tile waits
    begin_E, paired_E = before_E - before_E % 2, tiles_E - tiles_E % 2
    odd_E = torch.where(tiles_E % 2 == 1, torch.arange(num_experts, device=counts_E.device), -1)
    last_odd_E = odd_E.cummax(0).values

    tile_M = torch.arange(num_slots // block_m + min(num_slots, num_experts), device=counts_E.device)
    expert_M = torch.searchsorted(begin_E, tile_M, right=True) - 1
    within_M = tile_M - begin_E[expert_M]
    last_M = within_M >= paired_E[expert_M]
    waited_M = (within_M == paired_E[expert_M]) & (before_E[expert_M] % 2 == 1)
    expert_M = torch.where(waited_M, last_odd_E[expert_M - 1], expert_M)
    row_M = offsets_E1[expert_M] + torch.where(last_M, tiles_E[expert_M] - 1, within_M) * block_m
    used_M = tile_M < tiles_E.sum()
    return torch.stack([torch.where(used_M, expert_M, -1), torch.where(used_M, row_M, 0)]).int()
