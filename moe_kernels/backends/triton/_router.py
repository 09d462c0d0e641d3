"""What topk_route and its backward share, the scores and their sum; and its choices and their keys.

The sigmoid of all E is the bare two units: Triton's exponential and division spend half of a pass over the row on
results below 2**-126.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton import interpreted

MOST_TOKENS = 4  # of a program: their bins fill the lanes
LOWEST = tl.constexpr(-(2**31))  # no choice: below every key


@triton.jit
def tanh_of(x):
    """tanh, and its derivative, without the cancellation of 1 - tanh^2."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    xx = x * x
    near = x * (1.0 - xx * (0.3333333333 - xx * (0.1333333333 - xx * 0.0539682540)))
    value = tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -far, far))
    return tl.where(x != x, x, value), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def cap(z, soft_cap, CAP: tl.constexpr):
    if CAP:
        t, _ = tanh_of(z / soft_cap)
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
def score_of(z, top, total, SCORING: tl.constexpr, STEP: tl.constexpr):
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


@triton.jit
def total_of(chosen, epsilon, min_sum, STEP: tl.constexpr):
    """What the weights are divided by, and whether it follows them."""
    total = tl.sum(chosen, 1).to(STEP).to(tl.float32)
    total = (total + epsilon).to(STEP).to(tl.float32)
    return tl.maximum(total, min_sum, propagate_nan=tl.PropagateNan.ALL), total >= min_sum


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
def choice_of(
    z, bias, top, total, soft_cap, SCORING: tl.constexpr, CAP: tl.constexpr, AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, STEP: tl.constexpr, STEP_CHOICE: tl.constexpr,
):  # fmt: skip
    choice = cap(z, soft_cap, CAP)
    if not AFTER and SCORING == "sigmoid":
        choice = _sigmoid(choice).to(STEP).to(tl.float32)
    elif not AFTER:
        choice = score_of(choice, top[:, None], total[:, None], SCORING, STEP)
    if HAS_BIAS:
        choice = (choice + bias).to(STEP_CHOICE).to(tl.float32)
    return choice


@triton.jit
def ordered(choice):
    """Integers in the order of the floats: NaN as -inf, -0 as 0."""
    choice = tl.where(choice != choice, float("-inf"), choice) + 0.0
    bits = choice.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def contiguous_rows(logits_TE: Tensor) -> Tensor:
    return logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
