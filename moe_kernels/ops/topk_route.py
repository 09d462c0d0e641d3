"""topk_route: router logits -> routing weights [T, K] and expert indices [T, K] int64, best expert first.

    z        = soft_cap * tanh(logits / soft_cap)    where soft_cap > 0
    p        = scoring(z) in fp32                    softmax over E, sigmoid, or sqrt(softplus)
    choice   = p + selection_bias                    the bias chooses, it does not weigh, and gets no gradient;
                                                     without one the logits choose: every scoring ascends, and near
                                                     ties of p are no ties of the logits
    groups   : with num_groups > 1 keep the experts of the top_groups groups with the best sum of two choices, or the
               best choice (group_score "max"); losers_zero: the other experts stay, with a choice of 0
    indices  = the top_k of choice; ties go to the lowest index, NaN counts as -inf: always K distinct experts
    weights  = p[indices]; renormalize: / max(sum + epsilon, min_sum); * scale; cast to weights_dtype, fp32 by default

``score_after_topk`` picks on z and scores only the chosen (gpt-oss, Granite). ``round_scores`` rounds p and every later
step to the dtype of the logits, as routers do that leave the fp32 to nobody (Mistral 4, DeepSeek-V4, LFM2).
``topk_route_bwd`` is its backward: d_weights -> d_logits. The indices of a token are distinct; a slot whose index lies
outside 0..E-1 has no expert: it weighs nothing in the sums and gives no gradient.
"""

import torch

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")


def _check(
    logits_TE,
    bias_E,
    top_k,
    scoring,
    score_after_topk,
    renormalize,
    epsilon,
    scale,
    num_groups,
    top_groups,
    group_score="top2_sum",
    losers_zero=False,
    min_sum=0.0,
    soft_cap=0.0,
    round_scores=False,
    weights_dtype=None,
):
    op = "topk_route"
    c.check_matrix(op, "logits", logits_TE, 2, "[T, E]")
    experts = logits_TE.shape[1]
    _check_rule(op, scoring, min_sum, soft_cap)
    if not 1 <= top_k <= experts:
        c.fail(op, "top_k", top_k, f"from 1 to the number of experts {experts}")
    if bias_E is not None:
        c.check_matrix(op, "selection_bias", bias_E, 1, "[E]")
        c.check_device(op, "selection_bias", bias_E, logits_TE, "logits")
        c.check_size(op, "selection_bias", bias_E, 0, experts, "E of logits")
    if num_groups < 1 or experts % num_groups:
        c.fail(op, "num_groups", num_groups, f"a divisor of the number of experts {experts}")
    if not 1 <= top_groups <= num_groups:
        c.fail(op, "top_groups", top_groups, f"from 1 to num_groups {num_groups}")
    if top_k > experts // num_groups * top_groups:
        c.fail(op, "top_k", top_k, f"at most the {experts // num_groups * top_groups} experts of the kept groups")
    if group_score not in GROUP_SCORES:
        c.fail(op, "group_score", group_score, "one of " + ", ".join(GROUP_SCORES))
    if group_score == "top2_sum" and num_groups > 1 and experts // num_groups < 2:
        c.fail(op, "num_groups", num_groups, "such that each group has two experts or more")
    if weights_dtype not in (None, *c.FLOATS):
        c.fail(op, "weights_dtype", weights_dtype, "a floating-point dtype or None")


def _check_bwd(
    d_weights_TK,
    logits_TE,
    indices_TK,
    scoring,
    score_after_topk,
    renormalize,
    epsilon,
    scale,
    min_sum=0.0,
    soft_cap=0.0,
    round_scores=False,
):
    op = "topk_route_bwd"
    c.check_matrix(op, "d_weights", d_weights_TK, 2, "[T, K]")
    c.check_matrix(op, "logits", logits_TE, 2, "[T, E]")
    c.check_device(op, "logits", logits_TE, d_weights_TK, "d_weights")
    c.check_size(op, "logits", logits_TE, 0, d_weights_TK.shape[0], "T of d_weights")
    _check_rule(op, scoring, min_sum, soft_cap)
    experts = logits_TE.shape[1]
    if not 1 <= d_weights_TK.shape[1] <= experts:
        c.fail(op, "d_weights", d_weights_TK, f"of 1 to {experts} columns, the number of experts of logits")
    if indices_TK.dtype not in c.INTEGERS or indices_TK.shape != d_weights_TK.shape:
        c.fail(op, "indices", indices_TK, f"an int64 or int32 tensor shaped like d_weights {list(d_weights_TK.shape)}")
    c.check_device(op, "indices", indices_TK, d_weights_TK, "d_weights")


def _check_rule(op, scoring, min_sum, soft_cap):
    if scoring not in SCORINGS:
        c.fail(op, "scoring", scoring, "one of " + ", ".join(SCORINGS))
    if not min_sum >= 0:
        c.fail(op, "min_sum", min_sum, "0 (no minimum) or positive")
    if not soft_cap >= 0:
        c.fail(op, "soft_cap", soft_cap, "0 (no cap) or positive")


def _fake(logits, bias, top_k, *rule):
    weights_dtype = rule[12] if len(rule) > 12 else None  # the dispatcher leaves out trailing defaults
    weights_dtype = weights_dtype or torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((logits.shape[0], top_k), dtype=weights_dtype),
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
    )


def _problem(logits: torch.Tensor, top_k: int, num_groups: int = 1) -> Problem:
    """Triton holds any number of experts; the limits of the CUDA kernels are those of the routers there are."""
    experts = logits.shape[1]
    traits = [f"{experts} experts"] if experts > 1024 else []
    traits += [f"top_k {top_k}"] if top_k > 32 else []
    traits += ["groups"] if num_groups > 1 else []
    return Problem(logits.device, logits.dtype, (), traits=tuple(traits))


define(
    "topk_route(Tensor logits, Tensor? selection_bias, int top_k, str scoring, bool score_after_topk, "
    "bool renormalize, float epsilon, float scale, int num_groups, int top_groups, str group_score='top2_sum', "
    "bool losers_zero=False, float min_sum=0.0, float soft_cap=0.0, bool round_scores=False, "
    "ScalarType? weights_dtype=None) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    problem=lambda logits, bias, top_k, scoring, after, renormalize, epsilon, scale, num_groups, *_: _problem(
        logits, top_k, num_groups
    ),
)
define(
    "topk_route_bwd(Tensor d_weights, Tensor logits, Tensor indices, str scoring, bool score_after_topk, "
    "bool renormalize, float epsilon, float scale, float min_sum=0.0, float soft_cap=0.0, bool round_scores=False)"
    " -> Tensor",
    check=_check_bwd,
    fake=lambda d_weights, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    problem=lambda d_weights, logits, *_: _problem(logits, d_weights.shape[1]),
)
