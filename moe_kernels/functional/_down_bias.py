"""The bias of the down projection in the gradient of the routing weights, and its own gradient."""

import torch
from torch import Tensor

from moe_kernels.functional._autocast import cast, without_autocast
from moe_kernels.functional.routing_plan import RoutingPlan


def d_weights(d_weights_TK, d_out_TD, weights_TK, bias_ED, plan) -> Tensor:
    if bias_ED is not None:
        d_weights_TK = d_weights_TK + _in_d_weights(d_out_TD, bias_ED, plan)
    return cast(d_weights_TK, weights_TK.dtype)


def _expert_TK(plan: RoutingPlan) -> Tensor:
    """The expert of each slot; E for a dropped one."""
    # Not searchsorted: compiled by inductor it ignores that offsets[1:] starts at an offset (torch 2.11, on a GPU).
    expert_TK = (plan.positions_TK[..., None] >= plan.offsets_E1[1:]).sum(-1)
    return torch.where(plan.positions_TK < 0, plan.num_experts, expert_TK)


def _in_d_weights(d_out_TD, bias_ED, plan) -> Tensor:
    """<dO[t], b[e]> for each slot: the bias is part of what the routing weight multiplies."""
    acc = torch.promote_types(d_out_TD.dtype, torch.float32)
    with without_autocast(d_out_TD.device.type):
        dots_TE = d_out_TD.to(acc) @ bias_ED.to(acc).T
    dots_TE1 = torch.nn.functional.pad(dots_TE, (0, 1))
    return dots_TE1.gather(1, _expert_TK(plan))


def d_down_bias(d_out_TD, weights_TK, bias_ED, plan) -> Tensor:
    """sum over the rows of e of s * dO, as a product with the [T, E] matrix of routing weights."""
    acc = torch.promote_types(d_out_TD.dtype, torch.float32)
    experts_E = torch.arange(plan.num_experts, device=d_out_TD.device)
    expert_TK = _expert_TK(plan)
    weights_TE = d_out_TD.new_zeros((d_out_TD.shape[0], plan.num_experts), dtype=acc)
    for k in range(plan.top_k):  # adds in a fixed order, where a scatter of repeated ids would not
        weights_TE += torch.where(expert_TK[:, k, None] == experts_E, weights_TK[:, k, None].to(acc), 0)
    with without_autocast(d_out_TD.device.type):
        return (weights_TE.T @ d_out_TD.to(acc)).to(bias_ED.dtype)
