"""The soak's routers: topk_route and its backward by every rule, against the formulas of tests/ops/test_topk_route.py.

Scores of two backends differ in their last bits, so what hangs on those is not compared: which experts, where two
choices or two groups are that close, or a score lies so near the middle of two bf16 numbers that it may be rounded to
either; and the gradient, where the sum is that close to its minimum.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends, use_backend
from tests.ops.test_topk_route import naive_scores, naive_weights
from tests.tolerances import FLOOR, RELATIVE_L2, TIMES_PLAIN, Together

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
_GROUPS = ((1, 1), (1, 1), (1, 1), (2, 1), (4, 2), (8, 3), (8, 4), (16, 5))
#: How far scores may be from the true ones, as a share of them, and capped logits, as a share of the cap.
_SCORE, _CAPPED = 4e-6, 1e-6


class RouterCase(NamedTuple):
    T: int
    E: int
    K: int
    dtype: torch.dtype
    spread: float  # standard deviation of the logits
    bias_dtype: torch.dtype | None  # None: no bias
    weights_dtype: torch.dtype
    scoring: str
    after: bool
    renormalize: bool
    epsilon: float
    scale: float
    num_groups: int
    top_groups: int
    group_score: str
    losers_zero: bool
    min_sum: float
    soft_cap: float
    round_scores: bool

    @property
    def backward_rule(self) -> tuple:
        """Arguments of ``topk_route_bwd`` after its tensors."""
        how = self.scoring, self.after, self.renormalize, self.epsilon, self.scale
        return *how, self.min_sum, self.soft_cap, self.round_scores

    @property
    def step(self) -> torch.dtype:
        """What scores are rounded to."""
        return self.dtype if self.round_scores else FP32

    @property
    def rounds(self) -> bool:
        return self.step != FP32


class Inputs(NamedTuple):
    logits: Tensor
    bias: Tensor | None
    d_weights: Tensor


def draw(r: random.Random) -> RouterCase:
    def coin(share: float = 0.5) -> bool:
        return r.random() < share

    num_groups, top_groups = r.choice(_GROUPS)
    group_score = r.choice(("top2_sum", "max"))
    least = 1 if group_score == "max" and num_groups > 1 else 2
    size = r.randint(least, max(least, r.choice((24, 160, 1024)) // num_groups))
    dtype = r.choice((BF16, FP16, FP32))
    return RouterCase(
        T=r.randint(1, 700),
        E=num_groups * size,
        K=r.randint(1, min(32, top_groups * size)),
        dtype=dtype,
        spread=r.choice((0.2, 1.0, 4.0)),
        bias_dtype=r.choice((None, None, FP32, dtype)),
        weights_dtype=r.choice((BF16, FP16, FP32)),
        scoring=r.choice(_SCORINGS),
        after=coin(0.3),
        renormalize=coin(0.7),
        epsilon=r.choice((0.0, 1e-20)),
        scale=r.choice((1.0, 2.5)),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        losers_zero=coin(),
        min_sum=r.choice((0.0, 0.0, 0.1, 1.0)),
        soft_cap=r.choice((0.0, 0.0, 2.0, 30.0)),
        round_scores=coin(0.3),
    )


def inputs_of(c: RouterCase, number: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(number)

    def normal(*shape, scale, dtype):
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    bias = None if c.bias_dtype is None else normal(c.E, scale=0.1, dtype=c.bias_dtype)
    logits = normal(c.T, c.E, scale=c.spread, dtype=c.dtype)
    return Inputs(logits, bias, normal(c.T, c.K, scale=1.0, dtype=c.weights_dtype))


def forward(c: RouterCase, i: Inputs) -> tuple[Tensor, Tensor]:
    groups = c.num_groups, c.top_groups, c.group_score, c.losers_zero
    how = c.scoring, c.after, c.renormalize, c.epsilon, c.scale, *groups, c.min_sum, c.soft_cap, c.round_scores
    return torch.ops.moe_kernels.topk_route(i.logits, i.bias, c.K, *how, c.weights_dtype)


def backward(c: RouterCase, i: Inputs, indices: Tensor) -> Tensor:
    return torch.ops.moe_kernels.topk_route_bwd(i.d_weights, i.logits, indices, *c.backward_rule)


def check(c: RouterCase, number: int, device: str, backend: str) -> None:
    i = inputs_of(c, number, device)
    implemented = backends.IMPLEMENTS[backend]
    with torch.no_grad(), use_backend("reference"):
        plain, experts = forward(c, i)
        d_plain = backward(c, i, experts)
    z = i.logits.double().requires_grad_()
    true = weights_of(c, z, experts)
    (d_true,) = torch.autograd.grad(true, z, i.d_weights.double())
    with Together() as checks:
        if "topk_route" in implemented:
            (weights, found), again = forward(c, i), forward(c, i)
            for mine, other in zip((weights, found), again, strict=True):
                checks.same_bits(mine, other, "a rerun gave other bits")
            unsure = ~decided(c, i, experts)[:, None]
            checks.true((unsure | (found == experts)).all(), "other experts")
            _near(checks, c, "weights", *(each.masked_fill(unsure, 0) for each in (weights, true.detach(), plain)))
        if "topk_route_bwd" in implemented:
            d_logits, again = backward(c, i, experts), backward(c, i, experts)
            checks.same_bits(d_logits, again, "a rerun gave other bits")
            unsure = _at_the_minimum(c, i, experts)[:, None]
            # A weight of all but the whole sum has a gradient of all but zero: what is left of numbers like these.
            rounding = RELATIVE_L2[FP32] * c.scale * i.d_weights.double().norm()
            gradients = (each.masked_fill(unsure, 0) for each in (d_logits, d_true, d_plain))
            _near(checks, c, "d_logits", *gradients, rounding)


def _near(
    checks: Together, c: RouterCase, what: str, value: Tensor, true: Tensor, plain: Tensor, rounding: float | Tensor = 0
) -> None:
    """L2 errors: as tests/tolerances.py has it, but fp32 numbers that were rounded on their way are as those are."""
    size, error, of_plain = (each.double().norm() for each in (true, value - true, plain - true))
    floor = torch.finfo(c.step).eps if c.rounds else (FLOOR | RELATIVE_L2)[value.dtype]

    def judge(found: list[float]) -> None:
        error, limit = found
        assert error <= limit, f"{what}: L2 error {error:.2e}, allowed {limit:.2e}"  # fails on NaN, too

    checks.ask(torch.stack([error, TIMES_PLAIN * of_plain + floor * size + rounding]), judge)


def weights_of(c: RouterCase, z: Tensor, experts: Tensor) -> Tensor:
    """The true weights of these experts."""
    how = c.scoring, c.after, c.renormalize, c.epsilon, c.scale, c.min_sum, c.soft_cap
    return naive_weights(z, experts, *how)


def _at_the_minimum(c: RouterCase, i: Inputs, experts: Tensor) -> Tensor:
    """[T] bool: a rounding decides whether the sum or its minimum is divided by."""
    chosen = weights_of(c._replace(renormalize=False, scale=1.0), i.logits.double(), experts)
    near = 4 * torch.finfo(c.step).eps if c.rounds else RELATIVE_L2[FP32]
    return (chosen.sum(-1) + c.epsilon - c.min_sum).abs() <= near * c.min_sum


# Which experts


def decided(c: RouterCase, i: Inputs, experts: Tensor) -> Tensor:
    """[T] bool: these experts, in this order, whatever the last bits of the scores are."""
    low, high = _choices(c, i)
    sure = torch.ones_like(low[:, 0], dtype=torch.bool)
    lost = torch.zeros_like(low, dtype=torch.bool)
    if c.num_groups > 1:
        merits = [_merits(c, i, choice) for choice in (low, high)]
        best = torch.argsort(merits[0] + merits[1], dim=-1, descending=True, stable=True)[:, : c.top_groups]
        kept = torch.zeros_like(merits[0], dtype=torch.bool).scatter(1, best, True)
        sure = _apart(*merits, kept)
        lost = (~kept).repeat_interleave(c.E // c.num_groups, 1)
    if i.bias is None:
        low = high = i.logits.float()
    loser = 0.0 if c.losers_zero and i.bias is not None else -torch.inf
    low, high = (choice.masked_fill(lost, loser) for choice in (low, high))
    first, last = low.gather(1, experts), high.gather(1, experts)
    exact = first == last
    in_order = (first[:, :-1] > last[:, 1:]) | (exact[:, :-1] & exact[:, 1:])
    chosen = torch.zeros_like(lost).scatter(1, experts, True)
    return sure & in_order.all(-1) & _apart(low, high, chosen)


def _apart(low: Tensor, high: Tensor, inside: Tensor) -> Tensor:
    """[T] bool: those inside are above the others, wherever between low and high each is; exact ones may tie."""
    exact = low == high

    def least(of: Tensor) -> Tensor:
        return low.masked_fill(~of, torch.inf).amin(-1)

    def most(of: Tensor) -> Tensor:
        return high.masked_fill(~of, -torch.inf).amax(-1)

    return (least(inside) > most(~inside & ~exact)) & (least(inside & ~exact) > most(~inside))


def _choices(c: RouterCase, i: Inputs) -> tuple[Tensor, Tensor]:
    """The least and the most that a choice can be; equal where it is exact. No step turns an order round."""
    z, of_z = i.logits.double(), 0.0
    if c.soft_cap > 0:
        z, of_z = c.soft_cap * torch.tanh(z / c.soft_cap), _CAPPED * c.soft_cap

    def bound(sign: int) -> Tensor:
        if c.after:
            choice = z + sign * of_z
        else:
            factor = 1 + sign * (_SCORE + 2 * of_z)
            if c.scoring == "sqrtsoftplus":
                choice = (naive_scores(z, c.scoring).square() * factor).to(c.step).double().sqrt()
                choice = choice if c.rounds else choice * factor
            else:
                choice = naive_scores(z, c.scoring) * factor
            choice = choice.to(c.step)
        choice = choice.float()
        return choice if i.bias is None else (choice + i.bias).to(_step_of_choice(c)).float()

    return bound(-1), bound(1)


def _step_of_choice(c: RouterCase) -> torch.dtype:
    if c.bias_dtype is None or not c.rounds:
        return c.step
    return torch.promote_types(c.step, c.bias_dtype)


def _merits(c: RouterCase, i: Inputs, choice: Tensor) -> Tensor:
    grouped = choice.view(len(choice), c.num_groups, -1)
    if c.group_score == "max":
        return grouped.amax(-1)
    return grouped.topk(2).values.sum(-1).to(_step_of_choice(c)).float()
