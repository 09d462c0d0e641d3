"""topk_route: router logits -> routing weights [T, K] fp32 and expert indices [T, K] int64, best expert first.

    p        = scoring(logits) in fp32               softmax over E, or sigmoid
    choice   = p + selection_bias                    the bias chooses, it does not weigh, and gets no gradient
    groups   : with num_groups > 1 keep the experts of the top_groups groups with the best sum of two choices
    indices  = the top_k of choice; ties go to the lowest index, NaN counts as -inf: always K distinct experts
    weights  = p[indices]; renormalize: / (sum + epsilon); * scale

``score_after_topk`` picks on the logits and scores only the chosen (gpt-oss, Granite).
``topk_route_bwd`` is its backward: d_weights -> d_logits.
"""

import torch

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define

SCORINGS = ("softmax", "sigmoid")


def _check(logits_TE, bias_E, top_k, scoring, score_after_topk, renormalize, epsilon, scale, num_groups, top_groups):
    op = "topk_route"
    c.check_matrix(op, "logits", logits_TE, 2, "[T, E]")
    experts = logits_TE.shape[1]
    if scoring not in SCORINGS:
        c.fail(op, "scoring", scoring, "one of " + ", ".join(SCORINGS))
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
    if num_groups > 1 and experts // num_groups < 2:
        c.fail(op, "num_groups", num_groups, "such that each group has two experts or more")


def _check_bwd(d_weights_TK, logits_TE, indices_TK, scoring, score_after_topk, renormalize, epsilon, scale):
    c.check_matrix("topk_route_bwd", "d_weights", d_weights_TK, 2, "[T, K]")
    if indices_TK.shape != d_weights_TK.shape:
        c.fail("topk_route_bwd", "indices", indices_TK, f"shaped like d_weights {list(d_weights_TK.shape)}")


define(
    "topk_route(Tensor logits, Tensor? selection_bias, int top_k, str scoring, bool score_after_topk, "
    "bool renormalize, float epsilon, float scale, int num_groups, int top_groups) -> (Tensor, Tensor)",
    check=_check,
    fake=lambda logits, bias, top_k, *_: (
        logits.new_empty((logits.shape[0], top_k), dtype=torch.promote_types(logits.dtype, torch.float32)),
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
    ),
    problem=lambda logits, *_: Problem(logits.device, logits.dtype, ()),
)
define(
    "topk_route_bwd(Tensor d_weights, Tensor logits, Tensor indices, str scoring, bool score_after_topk, "
    "bool renormalize, float epsilon, float scale) -> Tensor",
    check=_check_bwd,
    fake=lambda d_weights, logits, *_: torch.empty_like(logits),
    problem=lambda d_weights, logits, *_: Problem(logits.device, logits.dtype, ()),
)
