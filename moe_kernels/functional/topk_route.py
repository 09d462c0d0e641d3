"""From router logits to routing weights and expert indices."""

import torch
from torch import Tensor

from moe_kernels import ops  # noqa: F401  defines torch.ops.moe_kernels
from moe_kernels.functional.routing_plan import refuse_double_backward


class _TopKRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, selection_bias_E, top_k, how, groups, rest, weights_dtype):
        weights_TK, indices_TK = torch.ops.moe_kernels.topk_route(
            logits_TE, selection_bias_E, top_k, *how, *groups, *rest, weights_dtype
        )
        ctx.save_for_backward(logits_TE, indices_TK)
        ctx.how = how + rest
        ctx.mark_non_differentiable(indices_TK)
        return weights_TK, indices_TK

    @staticmethod
    def backward(ctx, d_weights_TK, _):
        refuse_double_backward("topk_route")
        logits_TE, indices_TK = ctx.saved_tensors
        d_logits_TE = torch.ops.moe_kernels.topk_route_bwd(d_weights_TK, logits_TE, indices_TK, *ctx.how)
        return d_logits_TE, *[None] * 6


def topk_route(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    score_after_topk: bool = False,
    renormalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    selection_bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2_sum",
    losers_zero: bool = False,
    min_sum: float = 0.0,
    soft_cap: float = 0.0,
    round_scores: bool = False,
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts per token and weigh them.

    Args:
        logits_TE: router logits [T, E], any float dtype; the arithmetic is fp32 (fp64 for fp64).
        top_k: K, experts per token.
        scoring: "softmax" over the experts (Qwen3, Mixtral, OLMoE), "sigmoid" (DeepSeek-V3, GLM, MiniMax) or
            "sqrtsoftplus" (DeepSeek-V4).
        score_after_topk: choose on the logits, then score only the chosen (gpt-oss, Granite).
        renormalize: divide the K weights by their sum + ``epsilon``, but by no less than ``min_sum``.
        scale: multiplies the weights, after renormalising.
        selection_bias_E: [E], any float dtype, added to the scores for choosing only; gets no gradient (DeepSeek-V3,
            section 2.1.2 of arXiv 2412.19437). Without one the logits themselves are compared.
        num_groups, top_groups: keep only the experts of the ``top_groups`` best groups.
        group_score: what makes a group good: "top2_sum", its two best scores (DeepSeek-V3), or "max", its best one
            (DeepSeek-V2).
        losers_zero: the experts of the other groups take part with a score of 0, where they are left out by default: a
            negative score + bias loses against them.
        soft_cap: first replace the logits by soft_cap * tanh(logits / soft_cap); 0 for no cap.
        round_scores: round the scores and every step after them to the dtype of the logits, for routers that compute in
            the model's dtype. Without it only the results are rounded.
        weights_dtype: of the weights; None for fp32 (fp64 for fp64 logits).

    Returns:
        (weights [T, K], expert indices [T, K] int64), best expert first. Ties go to the lowest index; NaN scores
        are chosen last, and the K experts of a token are always distinct.

    Raises:
        TypeError: the logits or the bias are not floating-point.
        ValueError: an argument out of range, logits or a bias of the wrong shape, a bias on another device than the
            logits; named in the message.
        RuntimeError: an option of the wrong type, a double backward, a forced backend that can't run.
    """
    how = (scoring, score_after_topk, renormalize, epsilon, scale)
    groups = (num_groups, top_groups, group_score, losers_zero)
    rest = (min_sum, soft_cap, round_scores)
    if not torch.is_grad_enabled():  # autograd's apply takes the host 10 µs
        return torch.ops.moe_kernels.topk_route(logits_TE, selection_bias_E, top_k, *how, *groups, *rest, weights_dtype)
    return _TopKRoute.apply(logits_TE, selection_bias_E, top_k, how, groups, rest, weights_dtype)
