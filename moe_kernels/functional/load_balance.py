"""Balanced experts without an auxiliary loss: the update of the selection bias, and how even a load is.

    bias_e <- bias_e + rate * sign(mean load - load_e)

arXiv 2408.15664, section 3; DeepSeek-V3, arXiv 2412.19437, section 2.1.2. The bias takes part in choosing experts only,
so the update is no gradient and changes no loss by itself. Loads are integers and compared as integers (sum of all
against E times one), so every rank of a group computes the same bits. Nothing here waits for the GPU.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_kernels.ops import _contract as c


class ExpertLoad(NamedTuple):
    """How evenly tokens fall on experts, fp32, one value per row of counts; NaN where no token was routed."""

    max_over_mean: Tensor
    """Load of the fullest expert: 1 is even, E is everything on one expert."""
    min_over_mean: Tensor
    """Load of the emptiest expert: 1 is even, 0 is an expert without tokens."""
    entropy: Tensor
    """Entropy of the shares over log E: 1 is even, 0 is everything on one expert."""


def expert_load(counts_E: Tensor) -> ExpertLoad:
    """Metrics of the tokens each expert got.

    Args:
        counts_E: int64 or int32 [..., E], as ``RoutingPlan.tokens_per_expert_E``; rows may be layers.

    Raises:
        ValueError: the counts are no integer tensor with at least two experts.
    """
    _check_counts("expert_load", counts_E)
    num_experts = counts_E.shape[-1]
    shares_E = counts_E.double() / counts_E.sum(-1, keepdim=True)
    entropy = torch.special.entr(shares_E).sum(-1) / math.log(num_experts)
    values = (shares_E.amax(-1) * num_experts, shares_E.amin(-1) * num_experts, entropy)
    return ExpertLoad(*(value.float() for value in values))


def sum_over_group(counts_E: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Counts of all ranks of ``group`` together, in a new tensor."""
    if not isinstance(group, dist.ProcessGroup):
        c.fail("sum_over_group", "group", group, "a torch.distributed.ProcessGroup")
    counts_E = counts_E.to(torch.int64, copy=True).contiguous()
    dist.all_reduce(counts_E, group=group)
    return counts_E


@torch.no_grad()
def update_selection_bias_(
    bias_E: Tensor,
    counts_E: Tensor,
    *,
    rate: float = 1e-3,
    group: "dist.ProcessGroup | None" = None,
    master_E: Tensor | None = None,
) -> Tensor:
    """Move each expert's bias by ``rate`` towards an even load, in place.

    Call it once per optimizer step with the counts of all micro-batches. No token anywhere: no change.

    Args:
        bias_E: floating [..., E], the selection bias; rows may be layers.
        counts_E: int64 or int32 of the same shape: tokens each expert got; left as it is.
        rate: size of the step, at least 0; DeepSeek-V3 used 1e-3.
        group: sum the counts over this process group first; by default they are taken as they are.
        master_E: fp32 of the same shape, the value the steps add up in; the bias is then its rounding. A bf16 bias
            needs one: around 1 its own steps are 0.004 to 0.008, so that adding 1e-3 changes nothing.

    Returns:
        The counts the update used: the group's, where one is given.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or range, named in the message.
    """
    op = "update_selection_bias_"
    if not isinstance(bias_E, Tensor) or not bias_E.is_floating_point():
        c.fail(op, "bias", bias_E, "a floating tensor [..., E]")
    _check_counts(op, counts_E)
    if (counts_E.shape, counts_E.device) != (bias_E.shape, bias_E.device):
        c.fail(op, "counts", counts_E, f"{list(bias_E.shape)} on {bias_E.device}, like the bias")
    check_rate(op, rate)
    if master_E is not None:
        like = (master_E.shape, master_E.device, master_E.dtype) if isinstance(master_E, Tensor) else None
        if like != (bias_E.shape, bias_E.device, torch.float32):
            c.fail(op, "master", master_E, f"float32 {list(bias_E.shape)} on {bias_E.device}, like the bias")
    if group is not None:
        counts_E = sum_over_group(counts_E, group)

    loads_E = counts_E.to(torch.int64)
    signs_E = (loads_E.sum(-1, keepdim=True) - loads_E.shape[-1] * loads_E).sign()
    target_E = bias_E if master_E is None else master_E
    target_E.add_(signs_E.to(target_E.dtype), alpha=rate)
    if master_E is not None:
        bias_E.copy_(master_E)
    return counts_E


def check_rate(op: str, rate: object) -> None:
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not number or not 0 <= rate < math.inf:
        c.fail(op, "rate", rate, "a finite number, at least 0")


def _check_counts(op: str, counts: object) -> None:
    if not isinstance(counts, Tensor) or counts.dtype not in c.INTEGERS or counts.dim() < 1 or counts.shape[-1] < 2:
        c.fail(op, "counts", counts, "an int64 or int32 tensor [..., E] of two experts or more")
