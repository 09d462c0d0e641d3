"""The K best of a row, best first, for topk_route: a round for each, or a list that is sorted once.

**Rounds**, for few experts and for groups: a tournament of two levels. A pass over the row leaves the best key of each
bin of BIN neighbours. Each of K rounds takes the bin with the best key, reads its logits again (they are in L1 or L2),
finds the expert in it and the bin's next best key: what comes after (key, index) of the one just found, so nothing is
written back. A round costs E / BIN + BIN elements where a maximum over the row costs E. The bins of losing groups
start below every key.

**A list**: a threshold below which no chosen expert is, found by halving an interval as long as the best of K sets of
_SET elements stay above; then all elements that are not below it, 1.25 K of 512, go to a list (a bit each in their
lane, a sum over lanes for the places, a round for each bit of the fullest lane), and one sort of (key, index) in 64
bits puts the list in order.
"""

import triton
import triton.language as tl

from moe_kernels.backends.triton._router import LOWEST, choice_of, ordered
from moe_kernels.backends.triton._router_groups import best_groups, expert_of, is_expert

_HIGHEST = tl.constexpr(2**31 - 1)
_SET = tl.constexpr(8)
_HALVINGS = tl.constexpr(5)  # each less leaves more elements for the list


@triton.jit
def choose_in_rounds(
    choices, scores, m_w, p_row, bias_ptr, top, total, soft_cap, BIN: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_K: tl.constexpr, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    LOG_M: tl.constexpr, GROUP_SCORE: tl.constexpr, ZEROS: tl.constexpr, SCORING: tl.constexpr, CAP: tl.constexpr,
    AFTER: tl.constexpr, HAS_BIAS: tl.constexpr, STEP: tl.constexpr, STEP_CHOICE: tl.constexpr,
):  # fmt: skip
    """[tokens, BLOCK_K] the K best experts, best first: one a round."""
    BLOCK_T: tl.constexpr = choices.shape[0]
    WIDTH: tl.constexpr = choices.shape[1]
    BLOCK_M: tl.constexpr = 1 << LOG_M
    BINS: tl.constexpr = WIDTH // BIN
    # The key of the best float is the best key; a bin starts with an expert or has none.
    bins = tl.max(tl.reshape(tl.where(m_w, choices, float("-inf")), (BLOCK_T, BINS, BIN)), 2)
    o_b = tl.arange(0, BINS)[None, :]
    m_b = is_expert(o_b * BIN, MEMBERS, GROUPS, BLOCK_M)
    bins = tl.where(m_b, ordered(bins), LOWEST)
    if GROUPS > 1:
        grouped = tl.where(m_w & (scores == scores), scores, float("-inf"))
        grouped = tl.reshape(grouped, (BLOCK_T, BLOCK_G, BLOCK_M))
        keep = best_groups(grouped, GROUPS, TOP_GROUPS, GROUP_SCORE, LOG_M, STEP_CHOICE)
        of_bin = tl.broadcast_to(keep[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_M // BIN))
        kept_bins = tl.reshape(of_bin, (BLOCK_T, BINS))
        bins = tl.where((kept_bins == 0) & m_b, 0 if ZEROS else LOWEST, bins)

    o_i = tl.arange(0, BIN)[None, :]
    o_k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    last_key = tl.full((BLOCK_T,), _HIGHEST, tl.int32)
    last = tl.full((BLOCK_T,), -1, tl.int32)
    for k in range(TOP_K):
        best = tl.max(bins, 1)
        b = tl.min(tl.where(bins == best[:, None], o_b, BINS), 1)
        o = b[:, None] * BIN + o_i
        e, m = expert_of(o, MEMBERS, GROUPS, BLOCK_M), is_expert(o, MEMBERS, GROUPS, BLOCK_M)
        choice = tl.load(p_row[:, None] + e, mask=m, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + e, mask=m, other=0.0).to(tl.float32)
            choice = choice_of(choice, bias, top, total, soft_cap, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE)
        key = ordered(choice)
        if ZEROS:
            kept = tl.max(tl.where(o_b == b[:, None], kept_bins, 0), 1)
            key = tl.where(kept[:, None] == 0, 0, key)
        key = tl.where(m, key, LOWEST)
        # Of the elements with the best key those up to the last chosen are gone.
        same = key == best[:, None]
        gone = tl.where(best == last_key, last, -1)
        last = tl.min(tl.where(same & (o > gone[:, None]), o, WIDTH - 1), 1)
        last_key = best
        left = (key < best[:, None]) | (same & (o > last[:, None]))
        next_best = tl.max(tl.where(left, key, LOWEST), 1)
        bins = tl.where(o_b == b[:, None], next_best[:, None], bins)
        expert = expert_of(last, MEMBERS, GROUPS, BLOCK_M)
        chosen = tl.where(o_k == k, expert[:, None], chosen)
    return chosen


@triton.jit
def threshold(choices, TOP_K: tl.constexpr, VECTOR: tl.constexpr):
    """[tokens] floats that K elements of a row at least are not below, and few more than K."""
    TOKENS: tl.constexpr = choices.shape[0]
    SETS: tl.constexpr = choices.shape[1] // _SET
    # Best of each set of elements that one lane loaded
    best = tl.max(tl.reshape(choices, (TOKENS, SETS // 32, _SET // VECTOR, 32, VECTOR)), 4)
    best = tl.reshape(tl.max(best, 2), (TOKENS, SETS))
    # Of every two sets one is not below ``low``; from there on K of them are not, at each step.
    low = tl.min(tl.max(tl.reshape(best, (TOKENS, 2, SETS // 2)), 1), 1)
    step = tl.max(best, 1) - low
    for _ in tl.static_range(_HALVINGS):
        step *= 0.5
        higher = low + step
        enough = tl.sum((best >= higher[:, None]).to(tl.int32), 1) >= TOP_K
        low = tl.where(enough, higher, low)
    return low


@triton.jit
def bits_by_lane(mask, VECTOR: tl.constexpr):
    """mask [tokens, width] -> [tokens, lanes]: 16 bits, and above them their number. Bit ``c * VECTOR + v`` of a lane
    is element (c * lanes + lane) * VECTOR + v of the row, which that lane loaded."""
    CHUNKS: tl.constexpr = mask.shape[1] // (32 * VECTOR)
    tl.static_assert(CHUNKS * VECTOR <= 16, "too many bits")
    o = tl.arange(0, mask.shape[1])
    bit = 1 << (o // (32 * VECTOR) * VECTOR + o % VECTOR)
    bits = tl.where(mask, (bit + (1 << 16))[None, :], 0)
    return tl.sum(tl.sum(tl.reshape(bits, (mask.shape[0], CHUNKS, 32, VECTOR)), 3), 1)


@triton.jit
def write_list(p_list, bits, end, VECTOR: tl.constexpr):
    """Write the elements whose bits are set, a lane's downwards from before its ``end``; all [tokens * lanes]."""
    lane = tl.arange(0, bits.shape[0]) % 32
    while tl.max(bits, 0) > 0:
        highest = (bits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        end -= 1
        o = highest + (highest & -VECTOR) * 31 + lane * VECTOR
        o = tl.where(bits > 0, o, -1)
        tl.store(p_list + end, o, mask=o >= 0)
        bits = tl.where(bits > 0, bits - (1 << (highest & 31)), 0)


@triton.jit
def sort_list(
    p_list, length, p_row, bias_ptr, top, total, soft_cap, LIST: tl.constexpr, WIDTH: tl.constexpr,
    SCORING: tl.constexpr, CAP: tl.constexpr, AFTER: tl.constexpr, HAS_BIAS: tl.constexpr, STEP: tl.constexpr,
    STEP_CHOICE: tl.constexpr,
):  # fmt: skip
    """[tokens, LIST] the elements of the list, best first."""
    o_l = tl.arange(0, LIST)[None, :]
    m_l = o_l < length[:, None]
    o = tl.load(p_list[:, None] + o_l, mask=m_l, other=0)
    choice = tl.load(p_row[:, None] + o, mask=m_l, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=m_l, other=0.0).to(tl.float32)
        choice = choice_of(choice, bias, top, total, soft_cap, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE)
    key = tl.where(m_l, ordered(choice), LOWEST)
    pairs = tl.sort(key.to(tl.int64) << 32 | (WIDTH - o).to(tl.int64), descending=True)
    return WIDTH - (pairs & 0xFFFF).to(tl.int32)
