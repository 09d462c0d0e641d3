"""The routing plan: what the router's expert indices mean for every later op, computed once and passed down."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import ops  # noqa: F401  defines torch.ops.moe_kernels

#: Most rows of one tile of the row-wise products; a smaller power of two is taken when experts get fewer rows.
MAX_BLOCK_M = 128
MIN_BLOCK_M = 16


class RoutingPlan(NamedTuple):
    """Routed rows in expert order. Built by :func:`routing_plan`; layout in ``ops/routing_plan.py``."""

    offsets_E1: Tensor
    slots_R: Tensor
    positions_TK: Tensor
    tiles_2M: Tensor
    block_m: int

    @property
    def num_experts(self) -> int:
        return self.offsets_E1.shape[0] - 1

    @property
    def top_k(self) -> int:
        return self.positions_TK.shape[1]

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """int32 [E]: rows each expert got; on the device, reading it does not wait for the GPU."""
        return self.offsets_E1.diff()


def routing_plan(expert_indices_TK: Tensor, num_experts: int, *, block_m: int | None = None) -> RoutingPlan:
    """Sort the (token, expert) pairs by expert, stably and without a host sync.

    Args:
        expert_indices_TK: int64 or int32 [T, K]. Ids below 0 or >= ``num_experts`` mean "no expert": that slot
            contributes nothing. Ids may repeat within a row.
        num_experts: E, the number of expert weights on this device.
        block_m: rows per tile of the row-wise products, a power of two from 16 to 128; by default the power of two
            nearest above the mean rows per expert, at most 128.

    Returns:
        A :class:`RoutingPlan`.

    Raises:
        TypeError: the indices are no tensor, ``num_experts`` is no int.
        ValueError: wrong shape or dtype of the indices, ``num_experts`` or ``block_m`` out of range.
    """
    if not isinstance(expert_indices_TK, Tensor):
        raise TypeError(f"routing_plan: expert_indices must be a tensor [T, K], got {type(expert_indices_TK).__name__}")
    if not isinstance(num_experts, int):
        raise TypeError(f"routing_plan: num_experts must be an int, got {num_experts!r}")
    if block_m is None:
        block_m = _block_m(expert_indices_TK.numel(), num_experts)
    tensors = torch.ops.moe_kernels.routing_plan(expert_indices_TK, num_experts, block_m)
    return RoutingPlan(*tensors, block_m)


def check_plan(op: str, plan: object) -> None:
    if not isinstance(plan, RoutingPlan):
        accepted = "a RoutingPlan from routing_plan(expert_indices, num_experts)"
        raise TypeError(f"{op}: plan must be {accepted}, got {type(plan).__name__}")


def refuse_double_backward(op: str) -> None:
    """Called first thing in a backward: its ops have no derivatives of their own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward (create_graph=True) is not supported")


def _block_m(num_slots: int, num_experts: int) -> int:
    block_m = MIN_BLOCK_M
    while block_m < MAX_BLOCK_M and block_m * num_experts < num_slots:
        block_m *= 2
    return block_m
