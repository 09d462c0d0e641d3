"""The products of a layer by the kernels that are forced, and their check against the formulas in fp64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import backends
from tests import helpers
from tests.helpers import Case, Problem
from tests.tolerances import Together

ops = torch.ops.moe_kernels
BF16 = torch.bfloat16


def why_not() -> str | None:
    """The reason why the Hopper kernels can't run here, or None."""
    problem = backends.Problem(torch.device("cuda"), BF16, (128, 128), block_m=128)
    return backends.why_not("cuda", "gate_up", problem)


class How(NamedTuple):
    """How a problem is put to the kernels, beyond its case."""

    transposed: bool = False  # both weights are stored the other way round
    bias: bool = False  # of gate_up
    bias_down: bool = False
    stored: str = "both"  # what gate_up keeps: "h", "a" or "both"
    over_h: bool = False  # d_activation writes over H
    weights_dtype: torch.dtype = BF16  # of the routing weights
    wgrad_dtype: torch.dtype = BF16
    sums: bool = False  # each weight gradient with the sums of its lhs
    ungathered: bool = False  # a weight gradient of rows that lie in expert order, too
    accumulate: bool = False  # each weight gradient added to numbers that are there, too
    activation_only: bool = False  # only the two products with an activation


def _wgrads(p: Problem, how: How, x: Tensor, d_out: Tensor, h: Tensor, a: Tensor, y: Tensor) -> list[tuple]:
    """(of what, lhs, rhs, gather)"""
    if how.activation_only:
        return []
    plain = [("W_gate_up", h, x, "rhs"), ("W_down", d_out, a, "lhs")]
    return [*plain, ("W_ungathered", y, a, "none")] if how.ungathered else plain


def there(like: Tensor) -> Tensor:
    """Numbers in [-2, 2) that a weight gradient is added to: on every device the same, with all the bits of fp32."""
    numbers = torch.arange(like.numel(), device=like.device) * 7_368_787 % 2**24 - 2**23
    return (numbers.float() / 2**22).to(like.dtype).view(like.shape)


def products(p: Problem, how: How = How(), there: Callable[[Tensor], Tensor] = there) -> dict[str, Tensor]:  # noqa: B008  immutable
    """The products of a layer, as named results."""
    offsets, slots, _, tiles, block_m = p.plan
    K, activation, options = p.case.K, p.case.activation, p.case.options
    weights = p.weights.to(how.weights_dtype)
    rest = (offsets, slots, tiles, block_m, K, activation, how.stored != "a", how.stored != "h", *options)
    h, a = ops.gate_up(p.x, p.w_gate_up, p.bias_gate_up if how.bias else None, *rest)
    rows = {"H": h, "A": a} if how.stored == "both" else {"H": h} if how.stored == "h" else {"A": a}
    rest = (weights, offsets, slots, tiles, block_m, activation, *options)
    if how.over_h:
        dh = p.h.clone()
        a_scaled, d_s = ops.d_activation_(p.d_out, p.w_down, dh, *rest)
    else:
        dh, a_scaled, d_s = ops.d_activation(p.d_out, p.w_down, p.h, *rest)
    rows |= {"dH": dh, "A'": a_scaled}
    if not how.activation_only:
        bias_down = p.bias_down if how.bias_down else None
        rows["Y"] = ops.grouped_gemm(p.a, p.w_down, bias_down, offsets, tiles, block_m, True)
        rows["dX"] = ops.grouped_gemm(p.h, p.w_gate_up, None, offsets, tiles, block_m, False)
    results = {name: t[: p.kept] for name, t in rows.items()} | {"dS": d_s}
    for name, lhs, rhs, gather in _wgrads(p, how, p.x, p.d_out, p.h, p.a, p.y):
        dw, db = ops.grouped_wgrad(lhs, rhs, offsets, slots, K, gather, how.sums, how.wgrad_dtype)
        results |= {f"d{name}": dw, f"sums of d{name}": db} if how.sums else {f"d{name}": dw}
        if how.accumulate:
            into = there(dw)
            ops.grouped_wgrad_(lhs, rhs, offsets, slots, K, gather, into)
            results[f"d{name} added"] = into
    return results


def formulas(p: Problem, how: How, x, d_out, w_gate_up, w_down, h, a, y, weights, bias, bias_down) -> dict[str, Tensor]:
    h_out, a_out = helpers.gate_up(p, x, w_gate_up, bias)
    dh, a_scaled, d_s = helpers.d_activation(p, d_out, w_down, h, weights)
    results = {"H": h_out, "A": a_out, "dH": dh, "A'": a_scaled, "dS": d_s}
    if not how.activation_only:
        results["Y"] = helpers.grouped_gemm(p, a, w_down, bias_down, True)
        results["dX"] = helpers.grouped_gemm(p, h, w_gate_up, None, False)
    for name, lhs, rhs, gather in _wgrads(p, how, x, d_out, h, a, y):
        lhs, rhs = lhs[p.token_r] if gather == "lhs" else lhs, rhs[p.token_r] if gather == "rhs" else rhs
        results[f"d{name}"], results[f"sums of d{name}"] = helpers.grouped_wgrad(p, lhs, rhs)
    return results


def check_results(p: Problem, how: How, ours: dict[str, Tensor], checks: Together) -> None:
    """``ours`` against the formulas on what ``p`` holds."""
    biases = p.bias_gate_up if how.bias else None, p.bias_down if how.bias_down else None
    inputs = (p.x, p.d_out, p.w_gate_up, p.w_down, p.h, p.a, p.y, p.weights.to(how.weights_dtype), *biases)
    truth, plain = formulas(p, how, *helpers.doubled(*inputs)), formulas(p, how, *inputs)
    for name, result in ours.items():
        if name.endswith(" added"):
            dw = ours[name.removesuffix(" added")]
            checks.same_bits(result, there(dw) + dw, name)
            continue
        if name == "dS" or (name.startswith("dW") and result.dtype != BF16):
            # Stored in fp32 but products of half-precision data; and tensor cores drop low bits of a sum over many
            # rows: compared in the dtype of the data
            result = result.to(BF16)
        checks.close(result, truth[name], plain[name], name)


def transpose_weights(p: Problem) -> None:
    """The same values, stored the other way round."""
    p.w_gate_up, p.w_down = p.w_gate_up.mT.contiguous().mT, p.w_down.mT.contiguous().mT


def check(case: Case, *how, **named) -> None:
    """The products of a case; the rest are the fields of :class:`How`."""
    p, how = Problem(case, "cuda", BF16), How(*how, **named)
    if how.transposed:
        transpose_weights(p)
    with Together() as checks:
        check_results(p, how, products(p, how), checks)
