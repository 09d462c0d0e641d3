"""From router logits to routing weights and expert indices."""

import torch
from torch import Tensor

from moe_kernels import ops  # noqa: F401  defines torch.ops.moe_kernels
from moe_kernels.functional.routing_plan import refuse_double_backward


class _TopKRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, selection_bias_E, top_k, how, groups):
        weights_TK, indices_TK = torch.ops.moe_kernels.topk_route(logits_TE, selection_bias_E, top_k, *how, *groups)
        ctx.save_for_backward(logits_TE, indices_TK)
        ctx.how = how
        ctx.mark_non_differentiable(indices_TK)
        return weights_TK, indices_TK

    @staticmethod
    def backward(ctx, d_weights_TK, _):
        refuse_double_backward("topk_route")
        logits_TE, indices_TK = ctx.saved_tensors
        return (
            torch.ops.moe_kernels.topk_route_bwd(d_weights_TK, logits_TE, indices_TK, *ctx.how),
            None,
            None,
            None,
            None,
        )


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
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts per token and weigh them.

    Args:
        logits_TE: router logits [T, E], any float dtype; the arithmetic is fp32 (fp64 for fp64).
        top_k: K, experts per token.
        scoring: "softmax" over the experts (Qwen3, Mixtral, OLMoE) or "sigmoid" (DeepSeek-V3, GLM, MiniMax).
        score_after_topk: choose on the logits, then score only the chosen (gpt-oss, Granite).
        renormalize: divide the K weights by their sum + ``epsilon``.
        scale: multiplies the weights, after renormalising.
        selection_bias_E: [E] added to the scores for choosing only; gets no gradient (DeepSeek-V3, section 2.1.2 of
            arXiv 2412.19437).
        num_groups, top_groups: keep only the experts of the ``top_groups`` groups whose two best scores sum highest.

    Returns:
        (weights [T, K] fp32, expert indices [T, K] int64), best expert first. Ties go to the lowest index; NaN scores
        are chosen last, and the K experts of a token are always distinct.

    Raises:
        ValueError: an argument out of range or a bias of the wrong shape, named in the message.
    """
    how = (scoring, score_after_topk, renormalize, epsilon, scale)
    return _TopKRoute.apply(logits_TE, selection_bias_E, top_k, how, (num_groups, top_groups))
