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
    num_experts = counts_E.numel()
    tiles_E = (counts_E + block_m - 1) // block_m
    first_tile_E1 = torch.cat([tiles_E.new_zeros(1), tiles_E.cumsum(0)])
    tile_M = torch.arange(num_slots // block_m + min(num_slots, num_experts), device=counts_E.device)
    expert_M = torch.searchsorted(first_tile_E1[1:], tile_M, right=True)
    used_M = expert_M < num_experts
    expert_M = expert_M.clamp(max=num_experts - 1)
    row_M = offsets_E1[expert_M] + (tile_M - first_tile_E1[expert_M]) * block_m
    return torch.stack([torch.where(used_M, expert_M, -1), torch.where(used_M, row_M, 0)]).int()
