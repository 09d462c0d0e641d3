"""The soak: random problems for every CUDA kernel, each against the formulas and against a rerun, bit for bit.

A case is a number: the same problem comes of it everywhere (its tensors only on the same kind of device). "hopper" is
all products of a layer; the other kinds are ops. tests/gpu/test_soak.py runs them in chunks, on poisoned memory.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends, use_backend
from tests import helpers
from tests.gpu import hopper, soak_router
from tests.gpu.hopper import BF16, How
from tests.helpers import SKEWED, Case, Problem, make_indices
from tests.ops import test_combine, test_decode_experts, test_permute
from tests.ops.test_routing_plan import assert_same_plan
from tests.tolerances import Together

FP16, FP32 = torch.float16, torch.float32
#: Cases of a kind that make a soak.
FULL = 2000
#: Cases of a kind that an ordinary test run takes.
FEW = 50
CHUNK = 25

# Drawing

#: How often: each routing, of SKEWED.
_ROUTINGS = dict(zip(SKEWED, (4, 2, 3, 3, 3, 0.3, 4), strict=True))
#: How often, then ranges of T, K, E, D / 64, I / 8.
_SIZES = (
    (5, (1, 900), (1, 4), (1, 20), (1, 9), (1, 90)),
    (1.5, (1, 600), (1, 8), (20, 200), (1, 3), (1, 16)),  # many experts
    (1, (1000, 4000), (1, 2), (1, 6), (1, 4), (1, 32)),  # many rows
    (1, (1, 160), (1, 2), (1, 4), (10, 32), (60, 260)),  # wide
    (1.5, (1, 8), (1, 8), (1, 12), (1, 8), (1, 64)),  # few tokens
)


class HopperCase(NamedTuple):
    case: Case
    how: How


class PlanCase(NamedTuple):
    case: Case
    ids: torch.dtype


class CombineCase(NamedTuple):
    case: Case
    dtype: torch.dtype
    weights: str  # "none", "same" or "float32"
    residual: str  # "none", "apart", or "over": the output's memory
    sliced: bool  # the output is a slice of columns


class PermuteCase(NamedTuple):
    """Of permute or unpermute."""

    case: Case
    dtype: torch.dtype
    weights: str  # "none", "same" or "float32"
    sliced: bool  # the rows that are read are a slice of columns


class DecodeCase(NamedTuple):
    case: Case
    dtype: torch.dtype
    bias: bool
    ids: torch.dtype
    weights: str  # "same" or "float32"


def _coin(r: random.Random) -> bool:
    return r.random() < 0.5


def _rows(r: random.Random, least: int, most: int) -> int:
    """Half of the time within one of a multiple of a tile's rows, where there is one."""
    size = r.randint(least, most)
    near = round(size / 128) * 128 + r.randint(-1, 1)
    return near if _coin(r) and least <= near <= most else size


def _routing(r: random.Random) -> str:
    return r.choices(list(_ROUTINGS), list(_ROUTINGS.values()))[0]


def _draw_hopper(r: random.Random) -> HopperCase:
    (_, tokens, *ranges) = r.choices(_SIZES, [often for often, *_ in _SIZES])[0]
    T, (K, E, D, I) = _rows(r, *tokens), (r.randint(*each) for each in ranges)  # noqa: E741  the library's letter
    activation, interleaved = r.choice(helpers.LAYOUTS)
    case = Case(T, K, E, 64 * D, 8 * I, activation, _routing(r), 128, interleaved)
    how = How(
        transposed=_coin(r),
        bias=_coin(r),
        bias_down=_coin(r),
        stored=r.choice(("both", "both", "h", "a")),
        over_h=_coin(r),
        weights_dtype=r.choice((BF16, FP32, FP16)),
        wgrad_dtype=r.choice((BF16, FP32)),
        sums=_coin(r),
        ungathered=_coin(r),
        accumulate=_coin(r),
    )
    return HopperCase(case, how)


def _draw_plan(r: random.Random) -> PlanCase:
    T, K, E = _rows(r, 0, r.choice((600, 600, 5000))), r.randint(1, 8), r.randint(1, r.choice((16, 300, 1200)))
    case = Case(T, K, E, 0, 0, routing=_routing(r), block_m=r.choice((16, 32, 64, 128)))
    return PlanCase(case, r.choice((torch.int32, torch.int64)))


def _draw_combine(r: random.Random) -> CombineCase:
    case = Case(_rows(r, 0, 400), r.randint(1, 12), r.randint(1, 40), 8 * r.randint(1, 200), 8, routing=_routing(r))
    dtype = r.choice((BF16, FP16, FP32))
    return CombineCase(
        case, dtype, r.choice(("none", "same", "float32")), r.choice(("none", "apart", "over")), _coin(r)
    )


def _draw_permute(r: random.Random) -> PermuteCase:
    case = Case(_rows(r, 0, 400), r.randint(1, 12), r.randint(1, 40), 8 * r.randint(1, 200), 8, routing=_routing(r))
    return PermuteCase(case, r.choice((BF16, FP16, FP32)), r.choice(("none", "same", "float32")), _coin(r))


def _draw_decode(r: random.Random) -> DecodeCase:
    T, K = r.randint(1, r.choice((4, 32, 256))), r.randint(1, 8)
    # A, Y and the sum are rounded: of a handful of numbers, plain torch would now and then be twice as close by luck
    D = 8 * r.randint(-(-512 // (8 * T)), 80)
    activation, interleaved = r.choice(helpers.LAYOUTS)
    case = Case(T, K, r.randint(1, 64), D, 8 * r.randint(1, 40), activation, _routing(r), interleaved=interleaved)
    ids = r.choice((torch.int32, torch.int64))
    return DecodeCase(case, r.choice((BF16, FP16)), _coin(r), ids, r.choice(("same", "float32")))


# Checking: a case asks the GPU for numbers once, at its end, so that an error of the GPU has the name of its case


def _same_bits(checks: Together, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for mine, again in zip(first, second, strict=True):
        checks.same_bits(mine, again, "a rerun gave other bits")


def _check_hopper(drawn: HopperCase, number: int, device: str, backend: str) -> None:
    p, how = _problem(drawn.case, number, device, BF16), drawn.how
    if how.transposed:
        hopper.transpose_weights(p)
    ours = hopper.products(p, how)
    with Together() as checks:
        hopper.check_results(p, how, ours, checks)
        _same_bits(checks, list(ours.values()), list(hopper.products(p, how).values()))


def _check_plan(drawn: PlanCase, number: int, device: str, backend: str) -> None:
    case = drawn.case
    indices = make_indices(case, torch.Generator().manual_seed(number)).to(drawn.ids)
    moved = indices.to(device, non_blocking=True)
    first, second = (torch.ops.moe_kernels.routing_plan(moved, case.E, case.block_m) for _ in range(2))
    expected = helpers.naive_plan(indices, case.E, case.block_m)  # while the GPU is at it
    first, second = _on_host(first, second)
    with Together() as checks:
        _same_bits(checks, first, second)
    assert_same_plan(first, expected)


def _on_host(*results: Sequence[Tensor]) -> list[list[Tensor]]:
    """Results of int32, in one copy."""
    pieces = iter(
        torch.cat([each.flatten() for result in results for each in result])
        .cpu()
        .split([each.numel() for result in results for each in result])
    )
    return [[next(pieces).view(each.shape) for each in result] for result in results]


def _check_combine(drawn: CombineCase, number: int, device: str, backend: str) -> None:
    p = _problem(drawn.case, number, device, drawn.dtype)
    weights = _weights(p, drawn.weights)
    residual = None if drawn.residual == "none" else p.residual
    T, D = p.x.shape
    results = []
    with Together() as checks:
        for _ in range(2):
            out = torch.full((T, D + 16 * drawn.sliced), torch.nan, device=device, dtype=drawn.dtype)
            mine = out[:, 8 : 8 + D] if drawn.sliced else out
            if drawn.residual == "over":
                mine.copy_(p.residual)
            test_combine.run(p, p.y, weights, mine if drawn.residual == "over" else residual, mine)
            untouched = out.isnan().sum() == 16 * T * drawn.sliced
            checks.true(untouched, "columns beside the slice, or not all of it")
            results.append(out)
        _same_bits(checks, results[:1], results[1:])
        inputs = p.y, weights, residual
        checks.close(mine, helpers.combine(p, *helpers.doubled(*inputs)), helpers.combine(p, *inputs))


def _check_permute(drawn: PermuteCase, number: int, device: str, backend: str) -> None:
    p, weights, x = _permute_inputs(drawn, number, device, "x")
    first, second = (test_permute.run(p, x, weights) for _ in range(2))
    with Together() as checks:
        _same_bits(checks, [first], [second])
        checks.true((first[p.kept :] == 0).all(), "rows of dropped slots")
        kept, inputs = first[: p.kept], (p.x, weights)
        if weights is None:
            checks.true((kept == p.x[p.token_r]).all(), "a copy is exact")
        else:
            checks.close(kept, test_permute.scaled(p, *helpers.doubled(*inputs)), test_permute.scaled(p, *inputs))


def _check_unpermute(drawn: PermuteCase, number: int, device: str, backend: str) -> None:
    p, weights, y = _permute_inputs(drawn, number, device, "y")
    first, second = (torch.ops.moe_kernels.unpermute(y, p.plan.positions_TK, weights) for _ in range(2))
    with Together() as checks:
        _same_bits(checks, [first], [second])
        inputs = p.y, weights, None
        checks.close(first, helpers.combine(p, *helpers.doubled(*inputs)), helpers.combine(p, *inputs))


def _permute_inputs(drawn: PermuteCase, number: int, device: str, name: str) -> tuple[Problem, Tensor | None, Tensor]:
    """The problem, its weights, and the rows with this name as they are given to the op."""
    p = _problem(drawn.case, number, device, drawn.dtype)
    rows = getattr(p, name)
    if drawn.sliced:
        wide = rows.new_full((rows.shape[0], rows.shape[1] + 16), torch.nan)
        wide[:, 8:-8] = rows
        rows = wide[:, 8:-8]
    return p, _weights(p, drawn.weights), rows


def _weights(p: Problem, which: str) -> Tensor | None:
    return {"none": None, "same": p.weights, "float32": p.weights.float()}[which]


def decoded(p: Problem, x, weights, w_gate_up, w_down, bias_gate_up, bias_down) -> Tensor:
    """What ``decode_experts`` stands for."""
    _, a = helpers.gate_up(p, x, w_gate_up, bias_gate_up)
    return helpers.combine(p, helpers.grouped_gemm(p, a, w_down, bias_down, True), weights, None)


def _check_decode(drawn: DecodeCase, number: int, device: str, backend: str) -> None:
    p = _problem(drawn.case, number, device, drawn.dtype)
    weights = p.weights if drawn.weights == "same" else p.weights.float()
    changed = {"bias": drawn.bias, "indices": p.indices.to(drawn.ids), "weights": weights}
    first, second = (test_decode_experts.run(p, **changed) for _ in range(2))
    with Together() as checks:
        _same_bits(checks, [first], [second])
        biases = (p.bias_gate_up, p.bias_down) if drawn.bias else (None, None)
        inputs = p.x, weights, p.w_gate_up, p.w_down, *biases
        checks.close(first, decoded(p, *helpers.doubled(*inputs)), decoded(p, *inputs))


def _problem(case: Case, number: int, device: str, dtype: torch.dtype) -> Problem:
    return Problem(case, device, dtype, torch.Generator(device).manual_seed(number))


# Running


class Kind(NamedTuple):
    draw: Callable
    check: Callable


KINDS = {
    "hopper": Kind(_draw_hopper, _check_hopper),
    "routing_plan": Kind(_draw_plan, _check_plan),
    "permute": Kind(_draw_permute, _check_permute),
    "unpermute": Kind(_draw_permute, _check_unpermute),
    "combine": Kind(_draw_combine, _check_combine),
    "decode_experts": Kind(_draw_decode, _check_decode),
    "topk_route": Kind(soak_router.draw, soak_router.check),
}


class Outcome(NamedTuple):
    """Of some cases of a kind."""

    kind: str
    cases: int  # checked
    declined: int  # by topk_route, which may
    failures: list[str]


def draw(kind: str, number: int):
    """The case with this number."""
    return KINDS[kind].draw(random.Random(f"{kind} {number}"))


def why_not(kind: str) -> str | None:
    """The reason why the CUDA kernels of this kind can't run here, or None."""
    if kind == "hopper":
        return hopper.why_not()
    return backends.why_not("cuda", kind, backends.Problem(torch.device("cuda"), BF16, (64, 64)))


def run(kind: str, numbers: Sequence[int], device: str = "cuda", backend: str = "cuda") -> Outcome:
    """Check the cases with these numbers on a forced backend; a broken GPU ends the run."""
    checked, declined, failures = 0, 0, []
    for number in numbers:
        drawn = draw(kind, number)
        try:
            with use_backend(backend):
                KINDS[kind].check(drawn, number, device, backend)
        except Exception as error:  # of any kind: it is what is reported
            if kind == "topk_route" and backends.DECLINED in str(error):
                declined += 1
                continue
            failures.append(f"{kind}-{number}: {type(error).__name__}: {error}\n    {drawn}")
            if "CUDA error" in str(error):
                return Outcome(kind, checked, declined, failures)
        checked += 1
    return Outcome(kind, checked, declined, failures)


def chunks(kind: str, cases: int) -> list[tuple[str, range]]:
    """(kind, numbers), CHUNK at a time."""
    return [(kind, range(first, min(first + CHUNK, cases))) for first in range(0, cases, CHUNK)]
