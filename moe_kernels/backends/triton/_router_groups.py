"""The groups of experts that topk_route keeps, and where its experts lie in a row of groups rounded up."""

import triton
import triton.language as tl

from moe_kernels.backends.triton._router import LOWEST, ordered


@triton.jit
def expert_of(o, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Places of a row as the kernel sees it -> experts."""
    if GROUPS == 1 or MEMBERS == BLOCK_M:
        return o
    return o // BLOCK_M * MEMBERS + o % BLOCK_M


@triton.jit
def is_expert(o, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
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
def best_groups(
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
    key = tl.where(o_g < GROUPS, ordered(merit), LOWEST)
    for _ in range(TOP_GROUPS):
        best = tl.max(key, 1)
        group = tl.min(tl.where(key == best[:, None], o_g, BLOCK_G), 1)
        key = tl.where(o_g == group[:, None], LOWEST, key)
    return (key == LOWEST).to(tl.int32)  # and the groups without an expert, which no one asks for
