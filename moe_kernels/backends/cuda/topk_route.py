"""topk_route: launches ``csrc/topk_route.cu``, and ``csrc/topk_route_bwd.cu`` for the backward.

Logits and a bias that can't be read four elements at a time are copied, d_logits is cut out of rows of whole fours; a
bias and weights in fp64 are fp32 to the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.backends.cuda._extension import address, dtype_codes, launch, route_rule

_QUAD = 4  # the kernels read and write four logits at a time


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
    tokens, experts = logits_TE.shape
    weights_dtype = weights_dtype or torch.float32
    kernel_dtype = weights_dtype if weights_dtype in dtype_codes() else torch.float32
    weights_TK = torch.empty((tokens, top_k), dtype=kernel_dtype, device=logits_TE.device)
    indices_TK = torch.empty((tokens, top_k), dtype=torch.int64, device=logits_TE.device)
    if tokens == 0:
        return weights_TK.to(weights_dtype), indices_TK
    logits_TE = _quads(logits_TE)
    step = step_choice = logits_TE.dtype if round_scores else torch.float32
    if bias_E is not None:
        if round_scores and bias_E.dtype != step:
            step_choice = torch.float32
        bias_E = _quads(bias_E if bias_E.dtype in dtype_codes() else bias_E.float())
    launch(
        "topk_route",
        logits_TE.device,
        weights=address(weights_TK),
        weights_dtype=dtype_codes()[kernel_dtype],
        indices=address(indices_TK),
        logits=address(logits_TE),
        logits_stride=logits_TE.stride(0),
        logits_dtype=dtype_codes()[logits_TE.dtype],
        bias=address(bias_E),
        bias_dtype=dtype_codes()[None if bias_E is None else bias_E.dtype],
        tokens=tokens,
        num_experts=experts,
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        group_max=group_score == "max",
        losers_zero=losers_zero,
        step_choice=dtype_codes()[step_choice],
        rule=route_rule(scoring, score_after_topk, renormalize, epsilon, scale, min_sum, soft_cap, step),
    )
    return weights_TK.to(weights_dtype), indices_TK


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
    tokens, experts = logits_TE.shape
    width = -(-experts // _QUAD) * _QUAD
    d_logits_TE = torch.empty((tokens, width), dtype=logits_TE.dtype, device=logits_TE.device)
    if d_weights_TK.numel() == 0:
        return d_logits_TE.zero_()[:, :experts].contiguous()
    logits_TE, indices_TK = _quads(logits_TE), indices_TK.contiguous().long()
    d_weights_TK = d_weights_TK.contiguous()
    if d_weights_TK.dtype not in dtype_codes():
        d_weights_TK = d_weights_TK.float()
    step = logits_TE.dtype if round_scores else torch.float32
    launch(
        "topk_route_bwd",
        logits_TE.device,
        d_logits=address(d_logits_TE),
        d_logits_stride=width,
        d_weights=address(d_weights_TK),
        d_weights_dtype=dtype_codes()[d_weights_TK.dtype],
        logits=address(logits_TE),
        logits_stride=logits_TE.stride(0),
        logits_dtype=dtype_codes()[logits_TE.dtype],
        indices=address(indices_TK),
        tokens=tokens,
        num_experts=experts,
        top_k=indices_TK.shape[1],
        rule=route_rule(scoring, score_after_topk, renormalize, epsilon, scale, min_sum, soft_cap, step),
    )
    return d_logits_TE[:, :experts].contiguous()


def _quads(rows: Tensor) -> Tensor:
    """The tensor itself where each row starts at a multiple of four elements and can be read to one; else a copy that
    can, of the same shape."""
    width = rows.shape[-1]
    ok = rows.stride(-1) == 1 and width % _QUAD == 0 and rows.data_ptr() % (_QUAD * rows.element_size()) == 0
    if ok and (rows.dim() == 1 or rows.shape[0] == 1 or rows.stride(0) % _QUAD == 0):
        return rows
    return F.pad(rows, (0, -width % _QUAD)).contiguous()[..., :width]
