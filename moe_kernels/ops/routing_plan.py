"""routing_plan: expert indices -> everything the other ops need to know about the routing, without a host sync.

    offsets_E1   int32 [E+1]      expert e owns sorted rows offsets[e]..offsets[e+1]
    slots_R      int32 [R]        slot t*K+k of each sorted row; a permutation: dropped slots come last
    positions_TK int32 [T, K]     sorted row of each slot, -1 where the slot was dropped
    tiles_2M     int32 [2, M]     per tile of block_m rows: its expert (-1: unused) and its first row; two by two of
                                  one expert, but for last ones of two experts that have an odd number each

Slots keep their order inside an expert (a stable counting sort), so a plan is a pure function of the indices.
Ids below 0 or >= num_experts mean "no expert": the slot is dropped and contributes nothing. Ids may repeat in a row.
"""

import torch

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define


def max_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """How many tiles of ``block_m`` rows any routing of ``num_slots`` slots can need."""
    return num_slots // block_m + min(num_slots, num_experts)


def _check(indices_TK, num_experts, block_m):
    if indices_TK.dim() != 2 or indices_TK.dtype not in c.INTEGERS:
        c.fail("routing_plan", "expert_indices", indices_TK, "an int64 or int32 tensor [T, K]")
    if indices_TK.numel() >= 2**31:
        c.fail("routing_plan", "expert_indices", indices_TK, "smaller than 2**31 slots")
    if not 1 <= num_experts <= 4096:
        c.fail("routing_plan", "num_experts", num_experts, "from 1 to 4096")
    c.check_block_m("routing_plan", block_m)


def _fake(indices_TK, num_experts, block_m):
    slots = indices_TK.numel()
    return (
        indices_TK.new_empty(num_experts + 1, dtype=torch.int32),
        indices_TK.new_empty(slots, dtype=torch.int32),
        indices_TK.new_empty(indices_TK.shape, dtype=torch.int32),
        indices_TK.new_empty((2, max_tiles(slots, num_experts, block_m)), dtype=torch.int32),
    )


define(
    "routing_plan(Tensor expert_indices, int num_experts, int block_m) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    problem=lambda indices, *_: Problem(indices.device, None, ()),
)
