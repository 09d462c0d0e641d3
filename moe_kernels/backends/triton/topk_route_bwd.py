"""topk_route_bwd: gradients of the weights -> gradients of the logits, scores computed again.

    d_logits, from d_weights and the indices; nothing of an index outside 0..E-1      [T, K] -> [T, E]

A program is one warp and up to MOST_TOKENS tokens. It writes the dense part of a row (softmax: -p * sum; otherwise
zeros), then the K chosen over it after a barrier of its warp: one or two passes over the bytes of [T, E] and no product
of E and K. Predicted by bytes and machine code 4, 7 and 18 µs for the routers in ``topk_route.py``, measured 7.2, 8.8
and 21.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import Launch, cdiv, launch
from moe_kernels.backends.triton._router import MOST_TOKENS, cap, contiguous_rows, score_of, tanh_of, total_of

_LOGITS = 1024  # of a program; four rows of 512 take 24 µs where two take 21


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["d_weights_ptr", "indices_ptr"])
def route_bwd_kernel(
    d_logits_ptr,
    d_weights_ptr,
    logits_ptr,
    indices_ptr,
    T,
    stride_t,
    epsilon,
    scale,
    min_sum,
    soft_cap,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    AFTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    CAP: tl.constexpr,
    ROUND_SCORES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STEP: tl.constexpr = logits_ptr.dtype.element_ty if ROUND_SCORES else tl.float32
    DENSE: tl.constexpr = SCORING == "softmax" and not AFTER
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = (o_t < T)[:, None]
    p_row = logits_ptr + tl.minimum(o_t, T - 1) * stride_t
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_e = o_e < E
    o_k = tl.arange(0, BLOCK_K)[None, :]
    m_k = m_t & (o_k < TOP_K)

    chosen = tl.load(indices_ptr + o_t[:, None] * TOP_K + o_k, mask=m_k, other=-1)
    d = tl.load(d_weights_ptr + o_t[:, None] * TOP_K + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
    m_k = (chosen >= 0) & (chosen < E)
    d = tl.where(m_k, d, 0.0)
    raw = tl.load(p_row[:, None] + chosen, mask=m_k, other=float("-inf")).to(tl.float32)
    z = cap(raw, soft_cap, CAP)
    top = tl.zeros((BLOCK_T,), tl.float32)
    total = top
    if DENSE:
        row = tl.load(p_row[:, None] + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
        capped = cap(row, soft_cap, CAP)
        top = tl.max(tl.where(m_e, capped, float("-inf")), 1)
        total = tl.sum(tl.where(m_e, tl.exp(capped - top[:, None]), 0.0), 1)
    elif SCORING == "softmax":
        z = tl.where(m_k, z, float("-inf"))
        top = tl.max(z, 1)
        total = tl.sum(tl.where(m_k, tl.exp(z - top[:, None]), 0.0), 1)
    p = tl.where(m_k, score_of(z, top[:, None], total[:, None], SCORING, STEP), 0.0)
    if RENORMALIZE:
        weight, follows = total_of(p, epsilon, min_sum, STEP)
        d_sum = tl.where(follows, tl.sum(d * p, 1) / weight, 0.0)
        d = (d - d_sum[:, None]) / weight[:, None]
    if SCORING == "softmax":
        # Every weight pulls on the normaliser of them all.
        pull = tl.sum(tl.where(m_k, d * p, 0.0), 1)
        d = p * (d - pull[:, None])
    elif SCORING == "sigmoid":
        d = d * p * (1.0 - p)
    else:
        # Far to the left the score underflows and its derivative, half the score there, with it.
        d = tl.where(p > 0, d / (1.0 + tl.exp(-z)) / (2.0 * p), 0.0)
        d = tl.where(p != p, p, d)
    dense = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if DENSE:
        dense = -score_of(capped, top[:, None], total[:, None], SCORING, STEP) * pull[:, None]
        if CAP:
            _, slope = tanh_of(row / soft_cap)
            dense *= slope
    if CAP:
        _, slope = tanh_of(raw / soft_cap)
        d *= slope

    p_out = d_logits_ptr + o_t[:, None] * E
    tl.store(p_out + o_e, dense.to(d_logits_ptr.dtype.element_ty), mask=m_t & m_e)
    tl.debug_barrier()  # other lanes write over what this one wrote
    tl.store(p_out + chosen, d.to(d_logits_ptr.dtype.element_ty), mask=m_k)


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
    top_k, device = indices_TK.shape[1], logits_TE.device
    d_logits_TE = torch.empty((tokens, experts), dtype=logits_TE.dtype, device=device)
    if tokens == 0:
        return d_logits_TE
    logits_TE = contiguous_rows(logits_TE)
    block_e = triton.next_power_of_2(experts)
    block_t = min(MOST_TOKENS, cdiv(_LOGITS, block_e))
    launch(
        device,
        Launch(
            route_bwd_kernel,
            (cdiv(tokens, block_t),),
            {
                "d_logits_ptr": d_logits_TE,
                "d_weights_ptr": d_weights_TK.contiguous(),
                "logits_ptr": logits_TE,
                "indices_ptr": indices_TK.contiguous(),
                "T": tokens,
                "stride_t": logits_TE.stride(0),
                "epsilon": float(epsilon),
                "scale": float(scale),
                "min_sum": float(min_sum),
                "soft_cap": float(soft_cap),
            },
            {
                "E": experts,
                "TOP_K": top_k,
                "SCORING": scoring,
                "AFTER": score_after_topk,
                "RENORMALIZE": renormalize,
                "CAP": soft_cap > 0,
                "ROUND_SCORES": round_scores,
                "BLOCK_T": block_t,
                "BLOCK_E": block_e,
                "BLOCK_K": triton.next_power_of_2(top_k),
            },
            1,
            1,
        ),
    )
    return d_logits_TE
