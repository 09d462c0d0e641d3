"""topk_route: router logits -> routing weights and expert indices, best first.

    z       = cap tanh(logits / cap)           p = softmax over E | sigmoid | sqrt(softplus) of z
    indices = top K of p + bias, or of the logits where there is no bias        logits [T, E] -> [T, K] int64
    weights = scale p[indices] / max(sum + epsilon, min_sum)                    -> [T, K]

A program is one warp and up to MOST_TOKENS tokens, so that nothing waits at a barrier; their rows are held in
registers. Keys are 32-bit integers that order as the floats do; equal keys are told apart by index alone, so K experts
are distinct whatever the logits are. There are two ways to choose (``_router_order.py`` has both): **rounds**, for few
experts and for groups, and **a list**, for more than _FEW experts of 257 to _LONG. Where the elements are too many for
the list (many equal logits, infinities; of random ones 3 tokens in 100 with K=11, none with K=22) or too few (NaN), the
program takes the rounds.

With a bias a key is computed in two places and must be the same number in both: the kernel is compiled without fused
multiply-adds, which the compiler might form in one place and not in the other.

Predicted from the machine code of sm_90: clocks of an SM that a program of 4 tokens takes of its busiest pipe
(compares, selects and integers issue at half rate), and T = 16384 on 132 SMs at 1.7 GHz with that pipe full; then with
the latency of two waves of programs (4500 clocks for a list, 2000 and 350 a round) and the eighth by which the
first kernel was slower than that.

                                                                         predicted   measured       bytes alone
    E=128 K=8  softmax, bf16, rounds             62 +  8 * 22 clocks     4, 8 µs     7.8            2
    E=256 K=8  sigmoid, bias, 4 of 8 groups      292 + 8 * 26            9, 15       17.1           6
    E=512 K=22 sigmoid, bias, rounds             128 + 22 * 39           18, 31      33.5           12
    E=512 K=22 sigmoid, bias, list of 32         466 + 4 * 24 + rounds   11, 18      30.5
                               list of 64, a token a program                        22.9

The list of four tokens takes 123 registers, of one 51: more programs at a time hide the sort's latency. K maxima over
the whole row would take 9, 24 and 90 µs by the same count; a bitonic top-32 of the row's 64-bit pairs 70 µs at E=512.
Packing an index into the low bits of an fp32 key (QuACK's top-k) is cheaper but not exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import Launch, cdiv, launch
from moe_kernels.backends.triton._router import MOST_TOKENS, cap, choice_of, contiguous_rows, score_of, total_of
from moe_kernels.backends.triton._router_groups import expert_of, is_expert
from moe_kernels.backends.triton._router_order import bits_by_lane, choose_in_rounds, sort_list, threshold, write_list
from moe_kernels.backends.triton.topk_route_bwd import topk_route_bwd

__all__ = ["topk_route", "topk_route_bwd"]

_LONG = 512  # rows up to here fit in registers four at a time, 64 logits a lane; longer ones go alone
_FEW = 7  # experts that rounds choose as fast as a list does
_PLACES = 32  # in the lists of a program, at least
_BIN = 8  # a sector of fp32; 16, nearer the root of E, is up to 15 % slower, 32 a fifth to two fifths (H100)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["bias_ptr"])
def route_kernel(
    weights_ptr,
    indices_ptr,
    logits_ptr,
    bias_ptr,
    T,
    stride_t,
    epsilon,
    scale,
    min_sum,
    soft_cap,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORING: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    LOSERS_ZERO: tl.constexpr,
    AFTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND_SCORES: tl.constexpr,
    ROUND_CHOICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    # A row as the kernel sees it: BLOCK_G groups of 2**LOG_M, either rounded up to a power of two
    BLOCK_G: tl.constexpr,
    LOG_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIN: tl.constexpr,
    LIST: tl.constexpr,
):
    STEP: tl.constexpr = logits_ptr.dtype.element_ty if ROUND_SCORES else tl.float32
    STEP_CHOICE: tl.constexpr = logits_ptr.dtype.element_ty if ROUND_CHOICE else tl.float32
    MEMBERS: tl.constexpr = E // GROUPS
    BLOCK_M: tl.constexpr = 1 << LOG_M
    WIDTH: tl.constexpr = BLOCK_G * BLOCK_M
    ZEROS: tl.constexpr = LOSERS_ZERO and HAS_BIAS and GROUPS > 1
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    p_row = logits_ptr + tl.minimum(o_t, T - 1) * stride_t

    # The row once, in registers
    o_w = tl.arange(0, WIDTH)
    e_w, m_w = expert_of(o_w, MEMBERS, GROUPS, BLOCK_M), is_expert(o_w, MEMBERS, GROUPS, BLOCK_M)[None, :]
    row = tl.load(p_row[:, None] + e_w[None, :], mask=m_w, other=float("-inf")).to(tl.float32)
    top = tl.zeros((BLOCK_T,), tl.float32)
    total = top
    if SCORING == "softmax" and not AFTER:
        capped = cap(row, soft_cap, CAP)
        top = tl.max(tl.where(m_w, capped, float("-inf")), 1)
        total = tl.sum(tl.where(m_w, tl.exp(capped - top[:, None]), 0.0), 1)
    choices = row
    scores = row
    if HAS_BIAS or GROUPS > 1:
        bias_w = tl.zeros((WIDTH,), tl.float32)
        if HAS_BIAS:
            bias_w = tl.load(bias_ptr + e_w, mask=tl.reshape(m_w, (WIDTH,)), other=0.0).to(tl.float32)
        scores = choice_of(row, bias_w[None, :], top, total, soft_cap, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE)
        if HAS_BIAS:
            choices = scores
    short: tl.constexpr = False
    if LIST > 0:
        VECTOR: tl.constexpr = min(128 // logits_ptr.dtype.element_ty.primitive_bitwidth, WIDTH // 32)
        row_choices = tl.where(m_w, choices, float("-inf"))
        low = threshold(row_choices, TOP_K, VECTOR)
        bits = bits_by_lane((row_choices >= low[:, None]) & m_w, VECTOR)
        end = tl.cumsum(bits >> 16, 1)
        length = tl.max(end, 1)
        short = tl.min(tl.where((length >= TOP_K) & (length <= min(LIST, 2 * TOP_K)), 1, 0), 0) == 1
    if short:
        # A token's list lies in its row of indices for now.
        p_list = indices_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + o_t * (2 * TOP_K)
        p_lanes = tl.reshape(tl.broadcast_to(p_list[:, None], (BLOCK_T, 32)), (BLOCK_T * 32,))
        bits = tl.where(m_t[:, None], bits & 0xFFFF, 0)
        write_list(p_lanes, tl.reshape(bits, (BLOCK_T * 32,)), tl.reshape(end, (BLOCK_T * 32,)), VECTOR)
        tl.debug_barrier()  # lanes read what others wrote
        chosen = sort_list(
            p_list, tl.where(m_t, length, 0), p_row, bias_ptr, top, total, soft_cap, LIST, WIDTH, SCORING, CAP, AFTER,
            HAS_BIAS, STEP, STEP_CHOICE,
        )  # fmt: skip
    else:
        chosen = choose_in_rounds(
            choices, scores, m_w, p_row, bias_ptr, top, total, soft_cap, BIN, BLOCK_K, TOP_K, MEMBERS, GROUPS,
            TOP_GROUPS, BLOCK_G, LOG_M, GROUP_SCORE, ZEROS, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE,
        )  # fmt: skip

    o_k = tl.arange(0, BLOCK_K)[None, :]
    m_k = o_k < TOP_K
    z = tl.load(p_row[:, None] + chosen, mask=m_k, other=float("-inf")).to(tl.float32)
    z = cap(z, soft_cap, CAP)
    if SCORING == "softmax" and AFTER:
        z = tl.where(m_k, z, float("-inf"))
        top = tl.max(z, 1)
        total = tl.sum(tl.where(m_k, tl.exp(z - top[:, None]), 0.0), 1)
    weights = tl.where(m_k, score_of(z, top[:, None], total[:, None], SCORING, STEP), 0.0)
    if RENORMALIZE:
        total, _ = total_of(weights, epsilon, min_sum, STEP)
        weights = (weights / total[:, None]).to(STEP).to(tl.float32)
    weights = (weights * scale).to(STEP).to(weights_ptr.dtype.element_ty)
    p_out = o_t[:, None] * TOP_K + o_k
    tl.store(weights_ptr + p_out, weights, mask=m_t[:, None] & m_k)
    tl.store(indices_ptr + p_out, chosen.to(tl.int64), mask=m_t[:, None] & m_k)


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
    device = logits_TE.device
    weights_TK = torch.empty((tokens, top_k), dtype=weights_dtype or torch.float32, device=device)
    indices_TK = torch.empty((tokens, top_k), dtype=torch.int64, device=device)
    if tokens == 0:
        return weights_TK, indices_TK
    logits_TE = contiguous_rows(logits_TE)
    if bias_E is not None:
        bias_E = bias_E.contiguous()
    block_g = triton.next_power_of_2(num_groups)
    block_m = triton.next_power_of_2(experts // num_groups)
    places = _places(experts, top_k, num_groups)
    block_t = MOST_TOKENS if block_g * block_m <= _LONG else 1
    if places:
        block_t = cdiv(_PLACES, places)
    launch(
        device,
        Launch(
            route_kernel,
            (cdiv(tokens, block_t),),
            {
                "weights_ptr": weights_TK,
                "indices_ptr": indices_TK,
                "logits_ptr": logits_TE,
                "bias_ptr": logits_TE if bias_E is None else bias_E,
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
                "GROUPS": num_groups,
                "TOP_GROUPS": top_groups,
                "SCORING": scoring,
                "GROUP_SCORE": group_score,
                "LOSERS_ZERO": losers_zero,
                "AFTER": score_after_topk,
                "RENORMALIZE": renormalize,
                "CAP": soft_cap > 0,
                "HAS_BIAS": bias_E is not None,
                "ROUND_SCORES": round_scores,
                "ROUND_CHOICE": round_scores and (bias_E is None or bias_E.dtype == logits_TE.dtype),
                "BLOCK_T": block_t,
                "BLOCK_G": block_g,
                "LOG_M": block_m.bit_length() - 1,
                "BLOCK_K": places or triton.next_power_of_2(top_k),
                "BIN": min(_BIN, block_m),
                "LIST": places,
            },
            1,
            1,
            fp_fusion=False,
        ),
    )
    return weights_TK, indices_TK


def _places(experts: int, top_k: int, num_groups: int) -> int:
    """Of a token's list; 0 for no list."""
    if num_groups > 1 or top_k <= _FEW or not max(257, 22 * top_k) <= experts <= _LONG:
        return 0
    return triton.next_power_of_2(top_k + top_k // 2)
