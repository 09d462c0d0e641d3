"""topk_route: router logits -> routing weights and expert indices, best first; and its backward.

    z       = cap tanh(logits / cap)           p = softmax over E | sigmoid | sqrt(softplus) of z
    indices = top K of p + bias, or of the logits where there is no bias        logits [T, E] -> [T, K] int64
    weights = scale p[indices] / max(sum + epsilon, min_sum)                    -> [T, K]
    d_logits, from d_weights and the indices, scores computed again             -> [T, E]

A program is one warp and up to _TOKENS tokens, so that nothing waits at a barrier; their rows are held in registers.
Keys are 32-bit integers that order as the floats do; equal keys are told apart by index alone, so K experts are
distinct whatever the logits are. There are two ways to choose:

**Rounds**, for few experts and for groups: a tournament of two levels. A pass over the row leaves the best key of each
bin of _BIN neighbours. Each of K rounds takes the bin with the best key, reads its logits again (they are in L1 or L2),
finds the expert in it and the bin's next best key: what comes after (key, index) of the one just found, so nothing is
written back. A round costs E / _BIN + _BIN elements where a maximum over the row costs E. The bins of losing groups
start below every key.

**A list**, for more than _FEW experts of 257 to _LONG: a threshold below which no chosen expert is, found by halving an
interval as long as the best of K sets of _SET elements stay above; then all elements that are not below it, 1.25 K of
512, go to a list (a bit each in their lane, a sum over lanes for the places, a round for each bit of the fullest lane),
and one sort of (key, index) in 64 bits puts the list in order. Where the elements are too many for the list (many equal
logits, infinities; of random ones 3 tokens in 100 with K=11, none with K=22) or too few (NaN), the program takes the
rounds.

With a bias a key is computed in two places and must be the same number in both: the kernel is compiled without fused
multiply-adds, which the compiler might form in one place and not in the other. The sigmoid of all E is the bare two
units: Triton's exponential and division spend half of a pass over the row on results below 2**-126.

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

The backward writes the dense part of a row (softmax: -p * sum; otherwise zeros), then the K chosen over it after a
barrier of its warp: one or two passes over the bytes of [T, E] and no product of E and K. Predicted by bytes and
machine code 4, 7 and 18 µs for the shapes above, measured 7.2, 8.8 and 21.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton import interpreted
from moe_kernels.backends.triton._launch import Launch, cdiv, launch

_TOKENS = 4  # of a program: their bins fill the lanes
_LONG = 512  # rows up to here fit in registers four at a time, 64 logits a lane; longer ones go alone
_LOGITS_BWD = 1024  # of a program; four rows of 512 take 24 µs where two take 21
_FEW = 7  # experts that rounds choose as fast as a list does
_PLACES = 32  # in the lists of a program, at least
_BIN = 8  # a sector of fp32; 16, nearer the root of E, is up to 15 % slower, 32 a fifth to two fifths (H100)

_LOWEST = tl.constexpr(-(2**31))  # no choice: below every key
_HIGHEST = tl.constexpr(2**31 - 1)
_SET = tl.constexpr(8)
_HALVINGS = tl.constexpr(5)  # each less leaves more elements for the list


@triton.jit
def _key(choice):
    """Integers in the order of the floats: NaN as -inf, -0 as 0."""
    choice = tl.where(choice != choice, float("-inf"), choice) + 0.0
    bits = choice.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _tanh(x):
    """tanh, and its derivative, without the cancellation of 1 - tanh^2."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    xx = x * x
    near = x * (1.0 - xx * (0.3333333333 - xx * (0.1333333333 - xx * 0.0539682540)))
    value = tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -far, far))
    return tl.where(x != x, x, value), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _cap(z, soft_cap, CAP: tl.constexpr):
    if CAP:
        t, _ = _tanh(z / soft_cap)
        z = t * soft_cap
    return z


@triton.jit
def _softplus(z):
    """log(1 + exp(z)). log1p(u) = log(w) u / (w - 1) with w = 1 + u: the rounding of w cancels."""
    u = tl.exp(-tl.abs(z))
    w = 1.0 + u
    log1p = tl.where(u < 1e-4, u * (1.0 - 0.5 * u), tl.log(w) * (u / (w - 1.0)))
    return tl.where(z > 0, z, 0.0) + log1p


@triton.jit
def _score(z, top, total, SCORING: tl.constexpr, STEP: tl.constexpr):
    """Scores of capped logits; ``top`` and ``total`` of the softmax broadcast against them."""
    if SCORING == "softmax":
        p = tl.exp(z - top) / total
    elif SCORING == "sigmoid":
        p = 1.0 / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(SCORING == "sqrtsoftplus", "unknown scoring")
        p = tl.sqrt_rn(_softplus(z).to(STEP).to(tl.float32))
        p = tl.where(z != z, z, p)
    return p.to(STEP).to(tl.float32)


if interpreted():

    @triton.jit
    def _sigmoid(z):
        return 1.0 / (1.0 + tl.exp(-z))

else:

    @triton.jit
    def _sigmoid(z):
        """Results below 2**-126 are 0."""
        return tl.inline_asm_elementwise(
            """{
            mul.f32 $0, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, $0;
            add.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            }""",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _choice(
    z, bias, top, total, soft_cap, SCORING: tl.constexpr, CAP: tl.constexpr, AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, STEP: tl.constexpr, STEP_CHOICE: tl.constexpr,
):  # fmt: skip
    choice = _cap(z, soft_cap, CAP)
    if not AFTER and SCORING == "sigmoid":
        choice = _sigmoid(choice).to(STEP).to(tl.float32)
    elif not AFTER:
        choice = _score(choice, top[:, None], total[:, None], SCORING, STEP)
    if HAS_BIAS:
        choice = (choice + bias).to(STEP_CHOICE).to(tl.float32)
    return choice


@triton.jit
def _total(chosen, epsilon, min_sum, STEP: tl.constexpr):
    """What the weights are divided by, and whether it follows them."""
    total = tl.sum(chosen, 1).to(STEP).to(tl.float32)
    total = (total + epsilon).to(STEP).to(tl.float32)
    return tl.maximum(total, min_sum, propagate_nan=tl.PropagateNan.ALL), total >= min_sum


@triton.jit
def _expert(o, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Places of a row as the kernel sees it -> experts."""
    if GROUPS == 1 or MEMBERS == BLOCK_M:
        return o
    return o // BLOCK_M * MEMBERS + o % BLOCK_M


@triton.jit
def _is_expert(o, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    if GROUPS == 1 or MEMBERS == BLOCK_M:
        return o < MEMBERS * GROUPS
    return (o % BLOCK_M < MEMBERS) & (o // BLOCK_M < GROUPS)


@triton.jit
def _halve(first, second, ALONE: tl.constexpr):
    """The best two of each set along the last axis -> those of each two neighbouring sets; ALONE: of one element."""
    shape: tl.constexpr = (first.shape[0], first.shape[1], first.shape[2] // 2, 2)
    first = tl.reshape(first, shape)
    runner_up = tl.min(first, 3)
    if not ALONE:
        runner_up = tl.maximum(runner_up, tl.max(tl.reshape(second, shape), 3))
    return tl.max(first, 3), runner_up


@triton.jit
def _best_groups(
    choice,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    LOG_M: tl.constexpr,
    STEP: tl.constexpr,
):
    """choice [tokens, groups, members], without NaN -> 1 for the groups that are kept."""
    TOKENS: tl.constexpr = choice.shape[0]
    BLOCK_G: tl.constexpr = choice.shape[1]
    if GROUP_SCORE == "max":
        merit = tl.max(choice, 2)
    else:
        first, second = _halve(choice, choice, True)
        for _ in tl.static_range(LOG_M - 1):
            first, second = _halve(first, second, False)
        merit = tl.reshape(first + second, (TOKENS, BLOCK_G)).to(STEP).to(tl.float32)
    o_g = tl.arange(0, BLOCK_G)[None, :]
    key = tl.where(o_g < GROUPS, _key(merit), _LOWEST)
    for _ in range(TOP_GROUPS):
        best = tl.max(key, 1)
        group = tl.min(tl.where(key == best[:, None], o_g, BLOCK_G), 1)
        key = tl.where(o_g == group[:, None], _LOWEST, key)
    return (key == _LOWEST).to(tl.int32)  # and the groups without an expert, which no one asks for


@triton.jit
def _threshold(choices, TOP_K: tl.constexpr, VECTOR: tl.constexpr):
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
def _bits(mask, VECTOR: tl.constexpr):
    """mask [tokens, width] -> [tokens, lanes]: 16 bits, and above them their number. Bit ``c * VECTOR + v`` of a lane
    is element (c * lanes + lane) * VECTOR + v of the row, which that lane loaded."""
    CHUNKS: tl.constexpr = mask.shape[1] // (32 * VECTOR)
    tl.static_assert(CHUNKS * VECTOR <= 16, "too many bits")
    o = tl.arange(0, mask.shape[1])
    bit = 1 << (o // (32 * VECTOR) * VECTOR + o % VECTOR)
    bits = tl.where(mask, (bit + (1 << 16))[None, :], 0)
    return tl.sum(tl.sum(tl.reshape(bits, (mask.shape[0], CHUNKS, 32, VECTOR)), 3), 1)


@triton.jit
def _write_list(p_list, bits, end, VECTOR: tl.constexpr):
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
def _sort_list(
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
        choice = _choice(choice, bias, top, total, soft_cap, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE)
    key = tl.where(m_l, _key(choice), _LOWEST)
    pairs = tl.sort(key.to(tl.int64) << 32 | (WIDTH - o).to(tl.int64), descending=True)
    return WIDTH - (pairs & 0xFFFF).to(tl.int32)


@triton.jit
def _rounds(
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
    m_b = _is_expert(o_b * BIN, MEMBERS, GROUPS, BLOCK_M)
    bins = tl.where(m_b, _key(bins), _LOWEST)
    if GROUPS > 1:
        grouped = tl.where(m_w & (scores == scores), scores, float("-inf"))
        grouped = tl.reshape(grouped, (BLOCK_T, BLOCK_G, BLOCK_M))
        keep = _best_groups(grouped, GROUPS, TOP_GROUPS, GROUP_SCORE, LOG_M, STEP_CHOICE)
        of_bin = tl.broadcast_to(keep[:, :, None], (BLOCK_T, BLOCK_G, BLOCK_M // BIN))
        kept_bins = tl.reshape(of_bin, (BLOCK_T, BINS))
        bins = tl.where((kept_bins == 0) & m_b, 0 if ZEROS else _LOWEST, bins)

    o_i = tl.arange(0, BIN)[None, :]
    o_k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    last_key = tl.full((BLOCK_T,), _HIGHEST, tl.int32)
    last = tl.full((BLOCK_T,), -1, tl.int32)
    for k in range(TOP_K):
        best = tl.max(bins, 1)
        b = tl.min(tl.where(bins == best[:, None], o_b, BINS), 1)
        o = b[:, None] * BIN + o_i
        e, m = _expert(o, MEMBERS, GROUPS, BLOCK_M), _is_expert(o, MEMBERS, GROUPS, BLOCK_M)
        choice = tl.load(p_row[:, None] + e, mask=m, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + e, mask=m, other=0.0).to(tl.float32)
            choice = _choice(choice, bias, top, total, soft_cap, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE)
        key = _key(choice)
        if ZEROS:
            kept = tl.max(tl.where(o_b == b[:, None], kept_bins, 0), 1)
            key = tl.where(kept[:, None] == 0, 0, key)
        key = tl.where(m, key, _LOWEST)
        # Of the elements with the best key those up to the last chosen are gone.
        same = key == best[:, None]
        gone = tl.where(best == last_key, last, -1)
        last = tl.min(tl.where(same & (o > gone[:, None]), o, WIDTH - 1), 1)
        last_key = best
        left = (key < best[:, None]) | (same & (o > last[:, None]))
        next_best = tl.max(tl.where(left, key, _LOWEST), 1)
        bins = tl.where(o_b == b[:, None], next_best[:, None], bins)
        expert = _expert(last, MEMBERS, GROUPS, BLOCK_M)
        chosen = tl.where(o_k == k, expert[:, None], chosen)
    return chosen


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
    e_w, m_w = _expert(o_w, MEMBERS, GROUPS, BLOCK_M), _is_expert(o_w, MEMBERS, GROUPS, BLOCK_M)[None, :]
    row = tl.load(p_row[:, None] + e_w[None, :], mask=m_w, other=float("-inf")).to(tl.float32)
    top = tl.zeros((BLOCK_T,), tl.float32)
    total = top
    if SCORING == "softmax" and not AFTER:
        capped = _cap(row, soft_cap, CAP)
        top = tl.max(tl.where(m_w, capped, float("-inf")), 1)
        total = tl.sum(tl.where(m_w, tl.exp(capped - top[:, None]), 0.0), 1)
    choices = row
    scores = row
    if HAS_BIAS or GROUPS > 1:
        bias_w = tl.zeros((WIDTH,), tl.float32)
        if HAS_BIAS:
            bias_w = tl.load(bias_ptr + e_w, mask=tl.reshape(m_w, (WIDTH,)), other=0.0).to(tl.float32)
        scores = _choice(row, bias_w[None, :], top, total, soft_cap, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE)
        if HAS_BIAS:
            choices = scores
    short: tl.constexpr = False
    if LIST > 0:
        VECTOR: tl.constexpr = min(128 // logits_ptr.dtype.element_ty.primitive_bitwidth, WIDTH // 32)
        row_choices = tl.where(m_w, choices, float("-inf"))
        low = _threshold(row_choices, TOP_K, VECTOR)
        bits = _bits((row_choices >= low[:, None]) & m_w, VECTOR)
        end = tl.cumsum(bits >> 16, 1)
        length = tl.max(end, 1)
        short = tl.min(tl.where((length >= TOP_K) & (length <= min(LIST, 2 * TOP_K)), 1, 0), 0) == 1
    if short:
        # A token's list lies in its row of indices for now.
        p_list = indices_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + o_t * (2 * TOP_K)
        p_lanes = tl.reshape(tl.broadcast_to(p_list[:, None], (BLOCK_T, 32)), (BLOCK_T * 32,))
        bits = tl.where(m_t[:, None], bits & 0xFFFF, 0)
        _write_list(p_lanes, tl.reshape(bits, (BLOCK_T * 32,)), tl.reshape(end, (BLOCK_T * 32,)), VECTOR)
        tl.debug_barrier()  # lanes read what others wrote
        chosen = _sort_list(
            p_list, tl.where(m_t, length, 0), p_row, bias_ptr, top, total, soft_cap, LIST, WIDTH, SCORING, CAP, AFTER,
            HAS_BIAS, STEP, STEP_CHOICE,
        )  # fmt: skip
    else:
        chosen = _rounds(
            choices, scores, m_w, p_row, bias_ptr, top, total, soft_cap, BIN, BLOCK_K, TOP_K, MEMBERS, GROUPS,
            TOP_GROUPS, BLOCK_G, LOG_M, GROUP_SCORE, ZEROS, SCORING, CAP, AFTER, HAS_BIAS, STEP, STEP_CHOICE,
        )  # fmt: skip

    o_k = tl.arange(0, BLOCK_K)[None, :]
    m_k = o_k < TOP_K
    z = tl.load(p_row[:, None] + chosen, mask=m_k, other=float("-inf")).to(tl.float32)
    z = _cap(z, soft_cap, CAP)
    if SCORING == "softmax" and AFTER:
        z = tl.where(m_k, z, float("-inf"))
        top = tl.max(z, 1)
        total = tl.sum(tl.where(m_k, tl.exp(z - top[:, None]), 0.0), 1)
    weights = tl.where(m_k, _score(z, top[:, None], total[:, None], SCORING, STEP), 0.0)
    if RENORMALIZE:
        total, _ = _total(weights, epsilon, min_sum, STEP)
        weights = (weights / total[:, None]).to(STEP).to(tl.float32)
    weights = (weights * scale).to(STEP).to(weights_ptr.dtype.element_ty)
    p_out = o_t[:, None] * TOP_K + o_k
    tl.store(weights_ptr + p_out, weights, mask=m_t[:, None] & m_k)
    tl.store(indices_ptr + p_out, chosen.to(tl.int64), mask=m_t[:, None] & m_k)


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

    chosen = tl.load(indices_ptr + o_t[:, None] * TOP_K + o_k, mask=m_k, other=0)
    d = tl.load(d_weights_ptr + o_t[:, None] * TOP_K + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
    raw = tl.load(p_row[:, None] + chosen, mask=m_k, other=float("-inf")).to(tl.float32)
    z = _cap(raw, soft_cap, CAP)
    top = tl.zeros((BLOCK_T,), tl.float32)
    total = top
    if DENSE:
        row = tl.load(p_row[:, None] + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
        capped = _cap(row, soft_cap, CAP)
        top = tl.max(tl.where(m_e, capped, float("-inf")), 1)
        total = tl.sum(tl.where(m_e, tl.exp(capped - top[:, None]), 0.0), 1)
    elif SCORING == "softmax":
        z = tl.where(m_k, z, float("-inf"))
        top = tl.max(z, 1)
        total = tl.sum(tl.where(m_k, tl.exp(z - top[:, None]), 0.0), 1)
    p = tl.where(m_k, _score(z, top[:, None], total[:, None], SCORING, STEP), 0.0)
    if RENORMALIZE:
        weight, follows = _total(p, epsilon, min_sum, STEP)
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
        dense = -_score(capped, top[:, None], total[:, None], SCORING, STEP) * pull[:, None]
        if CAP:
            _, slope = _tanh(row / soft_cap)
            dense *= slope
    if CAP:
        _, slope = _tanh(raw / soft_cap)
        d *= slope

    p_out = d_logits_ptr + o_t[:, None] * E
    tl.store(p_out + o_e, dense.to(d_logits_ptr.dtype.element_ty), mask=m_t & m_e)
    tl.debug_barrier()  # other lanes write over what this one wrote
    tl.store(p_out + chosen, d.to(d_logits_ptr.dtype.element_ty), mask=m_k)


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
    logits_TE = _contiguous_rows(logits_TE)
    if bias_E is not None:
        bias_E = bias_E.contiguous()
    block_g = triton.next_power_of_2(num_groups)
    block_m = triton.next_power_of_2(experts // num_groups)
    places = _places(experts, top_k, num_groups)
    block_t = _TOKENS if block_g * block_m <= _LONG else 1
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
    logits_TE = _contiguous_rows(logits_TE)
    block_e = triton.next_power_of_2(experts)
    block_t = min(_TOKENS, cdiv(_LOGITS_BWD, block_e))
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


def _places(experts: int, top_k: int, num_groups: int) -> int:
    """Of a token's list; 0 for no list."""
    if num_groups > 1 or top_k <= _FEW or not max(257, 22 * top_k) <= experts <= _LONG:
        return 0
    return triton.next_power_of_2(top_k + top_k // 2)


def _contiguous_rows(logits_TE: Tensor) -> Tensor:
    return logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
