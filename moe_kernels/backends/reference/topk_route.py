import torch
from torch import Tensor

from moe_kernels.backends.reference._common import accumulator


def topk_route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    scoring: str,
    score_after_topk: bool,
    renormalize: bool,
    epsilon: float,
    scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    logits = logits_TE.to(accumulator(logits_TE.dtype))
    choice = logits if score_after_topk else _score(logits, scoring)
    if bias_E is not None:
        choice = choice + bias_E
    choice = choice.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if num_groups > 1:
        choice = _keep_best_groups(choice, num_groups, top_groups)
    order_TE = torch.argsort(choice, dim=-1, descending=True, stable=True)
    indices_TK = order_TE[:, :top_k].clone(memory_format=torch.contiguous_format)
    return _weigh(logits, indices_TK, scoring, score_after_topk, renormalize, epsilon, scale), indices_TK


def topk_route_bwd(
    d_weights_TK: Tensor,
    logits_TE: Tensor,
    indices_TK: Tensor,
    scoring: str,
    score_after_topk: bool,
    renormalize: bool,
    epsilon: float,
    scale: float,
) -> Tensor:
    logits = logits_TE.to(accumulator(logits_TE.dtype))
    scores = _score(logits.gather(1, indices_TK) if score_after_topk else logits, scoring)
    chosen_TK = scores if score_after_topk else scores.gather(1, indices_TK)
    d_chosen_TK = d_weights_TK.to(logits.dtype) * scale
    if renormalize:
        total = chosen_TK.sum(-1, keepdim=True) + epsilon
        d_chosen_TK = (d_chosen_TK - (d_chosen_TK * chosen_TK).sum(-1, keepdim=True) / total) / total
    zeros_TE = torch.zeros_like(logits)
    if score_after_topk:
        return zeros_TE.scatter(1, indices_TK, _score_bwd(d_chosen_TK, scores, scoring)).to(logits_TE.dtype)
    return _score_bwd(zeros_TE.scatter(1, indices_TK, d_chosen_TK), scores, scoring).to(logits_TE.dtype)


def _score(z: Tensor, scoring: str) -> Tensor:
    return z.softmax(-1) if scoring == "softmax" else z.sigmoid()


def _score_bwd(d_scores: Tensor, scores: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return scores * (d_scores - (d_scores * scores).sum(-1, keepdim=True))
    return d_scores * scores * (1 - scores)


def _weigh(logits, indices_TK, scoring, score_after_topk, renormalize, epsilon, scale) -> Tensor:
    if score_after_topk:
        weights_TK = _score(logits.gather(1, indices_TK), scoring)
    else:
        weights_TK = _score(logits, scoring).gather(1, indices_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + epsilon)
    return weights_TK * scale


def _keep_best_groups(choice: Tensor, num_groups: int, top_groups: int) -> Tensor:
    tokens, experts = choice.shape
    grouped = choice.view(tokens, num_groups, experts // num_groups)
    merit = grouped.topk(2, dim=-1).values.sum(-1)
    best = torch.argsort(merit, dim=-1, descending=True, stable=True)[:, :top_groups]
    keep = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, best, True)
    return torch.where(keep[..., None], grouped, -torch.inf).view(tokens, experts)
