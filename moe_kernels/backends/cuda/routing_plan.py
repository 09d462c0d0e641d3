"""routing_plan: launches ``csrc/routing_plan.cu``, on a copy of indices that are not contiguous."""

import torch
from torch import Tensor

from moe_kernels.backends.cuda._extension import address, launch, num_sms, routing_plan_workspace


def routing_plan(indices_TK: Tensor, num_experts: int, block_m: int):
    indices_TK = indices_TK.contiguous()
    slots = indices_TK.numel()
    num_tiles = slots // block_m + min(slots, num_experts)

    def empty(*shape: int) -> Tensor:
        return indices_TK.new_empty(shape, dtype=torch.int32)

    offsets_E1, slots_R, tiles_2M = empty(num_experts + 1), empty(slots), empty(2, num_tiles)
    positions_TK = empty(*indices_TK.shape)
    sms = num_sms(indices_TK.device)
    workspace = empty(routing_plan_workspace(slots, num_experts, sms))
    launch(
        "routing_plan",
        indices_TK.device,
        indices=address(indices_TK),
        index_bytes=indices_TK.element_size(),
        num_slots=slots,
        num_experts=num_experts,
        block_m=block_m,
        num_tiles=num_tiles,
        num_sms=sms,
        workspace=address(workspace),
        offsets=address(offsets_E1),
        slots=address(slots_R),
        positions=address(positions_TK),
        tiles=address(tiles_2M),
    )
    return offsets_E1, slots_R, positions_TK, tiles_2M
