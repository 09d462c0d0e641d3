import torch
import torch.nn.functional as F
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
    group_score: str = "top2_sum",
    losers_zero: bool = False,
    min_sum: float = 0.0,
    soft_cap: float = 0.0,
    round_scores: bool = False,
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    logits = logits_TE.to(accumulator(logits_TE.dtype))
    step = logits_TE.dtype if round_scores else logits.dtype
    z = _cap(logits, soft_cap)
    choice = z if score_after_topk else _score(z, scoring, step)
    step_choice = step
    if bias_E is not None:
        step_choice = torch.promote_types(step, bias_E.dtype) if round_scores else logits.dtype
        choice = _rounded(choice + bias_E, step_choice)
    keep = None
    if num_groups > 1:
        keep = _best_groups(_without_nan(choice), num_groups, top_groups, group_score, step_choice)
    if bias_E is None:
        choice = logits
    elif keep is not None and losers_zero:
        choice, keep = torch.where(keep, choice, 0), None
    order_TE = torch.argsort(_without_nan(choice), dim=-1, descending=True, stable=True)
    if keep is not None:  # the losers behind the last of the others, which may be -inf
        order_TE = order_TE.gather(1, torch.argsort(~keep.gather(1, order_TE), dim=-1, stable=True))
    indices_TK = order_TE[:, :top_k].clone(memory_format=torch.contiguous_format)

    if score_after_topk:
        weights_TK = _score(z.gather(1, indices_TK), scoring, step)
    else:
        weights_TK = _score(z, scoring, step).gather(1, indices_TK)
    if renormalize:
        total, _ = _total(weights_TK, epsilon, min_sum, step)
        weights_TK = _rounded(weights_TK / total, step)
    return _rounded(weights_TK * scale, step).to(weights_dtype or logits.dtype), indices_TK


def topk_route_bwd(
    d_weights_TK: Tensor,
    logits_TE: Tensor,
    indices_TK: Tensor,
    scoring: str,
    score_after_topk: bool,
    renormalize: bool,
    epsilon: float,
    scale: float,
    min_sum: float = 0.0,
    soft_cap: float = 0.0,
    round_scores: bool = False,
) -> Tensor:
    logits = logits_TE.to(accumulator(logits_TE.dtype))
    step = logits_TE.dtype if round_scores else logits.dtype
    experts = logits.shape[1]
    # Slots of no expert choose one more, whose score is 0.
    is_one_TK = (indices_TK >= 0) & (indices_TK < experts)
    indices_TK = torch.where(is_one_TK, indices_TK, experts).long()
    z = F.pad(_cap(logits, soft_cap), (0, 1), value=-torch.inf)
    zeros = torch.zeros_like(z)
    if score_after_topk:
        z = z.gather(1, indices_TK)
    scores = _score(z, scoring, step)
    chosen_TK = scores if score_after_topk else scores.gather(1, indices_TK)
    d_chosen_TK = torch.where(is_one_TK, d_weights_TK.to(logits.dtype) * scale, 0)
    if renormalize:
        total, follows = _total(chosen_TK, epsilon, min_sum, step)
        d_total = (d_chosen_TK * chosen_TK).sum(-1, keepdim=True) / total
        d_chosen_TK = torch.where(is_one_TK, (d_chosen_TK - torch.where(follows, d_total, 0)) / total, 0)
    if score_after_topk:
        d_z = zeros.scatter(1, indices_TK, _score_bwd(d_chosen_TK, z, scores, scoring))
    else:
        d_z = _score_bwd(zeros.scatter(1, indices_TK, d_chosen_TK), z, scores, scoring)
    d_z = d_z[:, :experts]
    if soft_cap > 0:
        d_z = d_z * (1 - torch.tanh(logits / soft_cap).square())
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format).copy_(d_z)


def _rounded(x: Tensor, step: torch.dtype) -> Tensor:
    """x as a computation in the dtype ``step`` would hand it on."""
    return x.to(step).to(x.dtype)


def _without_nan(choice: Tensor) -> Tensor:
    return choice.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _cap(z: Tensor, soft_cap: float) -> Tensor:
    return torch.tanh(z / soft_cap) * soft_cap if soft_cap > 0 else z


def _score(z: Tensor, scoring: str, step: torch.dtype) -> Tensor:
    if scoring == "softmax":
        return _rounded(z.softmax(-1), step)
    if scoring == "sigmoid":
        return _rounded(z.sigmoid(), step)
    return _rounded(_rounded(F.softplus(z), step).sqrt(), step)


def _score_bwd(d_scores: Tensor, z: Tensor, scores: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return scores * (d_scores - (d_scores * scores).sum(-1, keepdim=True))
    if scoring == "sigmoid":
        return d_scores * scores * (1 - scores)
    # Far to the left the score underflows and its derivative, half the score there, with it.
    return torch.where(scores > 0, d_scores * z.sigmoid() / (2 * scores), 0)


def _total(chosen_TK: Tensor, epsilon: float, min_sum: float, step: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the weights are divided by, and whether it follows them."""
    total = _rounded(_rounded(chosen_TK.sum(-1, keepdim=True), step) + epsilon, step)
    return (total.clamp(min=min_sum), total >= min_sum) if min_sum > 0 else (total, torch.ones_like(total).bool())


def _best_groups(choice: Tensor, num_groups: int, top_groups: int, group_score: str, step: torch.dtype) -> Tensor:
    """[T, E] bool: the experts of the groups that are kept."""
    tokens, experts = choice.shape
    grouped = choice.view(tokens, num_groups, experts // num_groups)
    merit = grouped.amax(-1) if group_score == "max" else _rounded(grouped.topk(2, dim=-1).values.sum(-1), step)
    best = torch.argsort(_without_nan(merit), dim=-1, descending=True, stable=True)[:, :top_groups]
    keep = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, best, True)
    return keep[..., None].expand_as(grouped).reshape(choice.shape)
