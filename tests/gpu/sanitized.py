"""Every CUDA kernel on a few dozen small, awkward problems, their results asserted: what the sanitizers watch.

    python -m tests.gpu.sanitized [NAME ...]

A NAME is an op, "hopper" for the products of a layer or "activations" for the two of them that have one; all by
default. tests/gpu/test_sanitizers.py runs it. Under a tool every launch and every allocation costs, so nothing is
launched twice or sent in vain.

Only our kernels are instrumented: torch's are many. So initcheck does not see what torch's kernels write, only copies
from the host, and every input is one. Nor does it see, before 2025.4, what the copy engine writes: results are not
copied to the host as they are, but added by a kernel of torch's to zeros that came from the host.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import use_backend
from moe_kernels.functional import RoutingPlan
from tests import helpers
from tests.gpu import hopper, soak
from tests.gpu.hopper import BF16, How
from tests.helpers import LAYOUTS, Case, Problem
from tests.ops import test_combine, test_decode_experts, test_permute
from tests.ops.test_routing_plan import assert_same_plan
from tests.tolerances import Together, assert_close

ops = torch.ops.moe_kernels
FP16, FP32 = torch.float16, torch.float32


def sent(value):
    """On the GPU, by copies from the host alone."""
    if isinstance(value, RoutingPlan):
        return RoutingPlan(*map(sent, value))
    return value.cuda() if isinstance(value, Tensor) else value


def with_sent(p: Problem, *names: str) -> Problem:
    """The problem with these of its tensors on the GPU."""
    moved = copy.copy(p)
    vars(moved).update({name: sent(getattr(p, name)) for name in names})
    return moved


def back(result: Tensor) -> Tensor:
    """On the host; see the head of this file."""
    zeros = torch.zeros(result.shape, dtype=result.dtype).cuda()
    return torch.add(result, zeros, out=zeros).cpu()


# The products of a layer

EVERYTHING = How(bias=True, bias_down=True, over_h=True, sums=True, ungathered=True, accumulate=True)
HOPPER = [
    (Case(1, 1, 1, 64, 8), How()),  # one row, one step, one piece of a chunk; a pair with an unused tile
    (Case(129, 1, 1, 128, 64), EVERYTHING),  # one row in the second tile of a pair
    (Case(64, 1, 1, 192, 256), How(transposed=True)),  # the second consumer has no rows
    (
        Case(260, 2, 3, 320, 136),
        How(wgrad_dtype=FP32, sums=True, accumulate=True),
    ),  # pairs of two experts, columns past a tile
    (Case(60, 4, 40, 256, 72), How(transposed=True, ungathered=True)),  # most experts less than a tile
    (Case(150, 2, 6, 128, 136, routing="all_to_one"), EVERYTHING),
    (Case(150, 2, 9, 128, 72, routing="empty"), EVERYTHING._replace(wgrad_dtype=FP32)),
    (Case(150, 3, 5, 128, 72, routing="sentinels"), How(stored="a", weights_dtype=FP32)),
    (Case(100, 2, 4, 128, 72, routing="all_dropped"), EVERYTHING),
    (Case(140, 2, 3, 832, 72), EVERYTHING),  # down in turn, 208 columns a tile
    (Case(700, 4, 12, 64, 520), How()),  # more tiles than a cluster's ring has places
]
#: Each layout and activation is a kernel of its own.
EACH_LAYOUT = [
    (
        Case(140, 2, 3, 64, 72, activation, interleaved=interleaved),
        How(transposed=i % 2 == 0, bias=i % 4 < 2, stored=("both", "h", "a")[i % 3], activation_only=True),
    )
    for i, (activation, interleaved) in enumerate(LAYOUTS)
]
OF_ACTIVATIONS = ("plan", "weights", "x", "w_gate_up", "bias_gate_up", "h", "w_down", "d_out")
OF_PRODUCTS = (*OF_ACTIVATIONS, "bias_down", "a", "y")


def run_hopper() -> Iterator[str]:
    return _products(HOPPER, OF_PRODUCTS)


def run_activations() -> Iterator[str]:
    return _products(EACH_LAYOUT, OF_ACTIVATIONS)


def _products(cases: Sequence[tuple[Case, How]], names: Sequence[str]) -> Iterator[str]:
    for case, how in cases:
        p = Problem(case._replace(block_m=128), dtype=BF16)
        if how.transposed:
            hopper.transpose_weights(p)
        p.weights = p.weights.to(how.weights_dtype)
        ours = {name: back(each) for name, each in hopper.products(with_sent(p, *names), how, _there).items()}
        with Together() as checks:
            hopper.check_results(p, how, ours, checks)
        yield f"{p.case} {how}"


def _there(like: Tensor) -> Tensor:
    return sent(hopper.there(torch.empty(like.shape, dtype=like.dtype)))


# The other kernels

PLANS = [
    Case(63, 2, 8, 0, 0, block_m=16),
    Case(1, 1, 1, 0, 0, block_m=16),
    Case(257, 8, 128, 0, 0, block_m=32),
    Case(129, 3, 9, 0, 0, routing="empty", block_m=128),
    Case(77, 6, 5, 0, 0, routing="duplicates", block_m=16),
    Case(33, 2, 4, 0, 0, routing="all_dropped", block_m=64),
    Case(300, 1, 513, 0, 0, routing="sentinels", block_m=128),
    Case(256, 8, 40, 0, 0, routing="sentinels", block_m=16),  # as many slots as one block sorts alone
    Case(683, 3, 40, 0, 0, routing="zipf", block_m=16),  # one more
    Case(2000, 8, 64, 0, 0, block_m=128),
    Case(900, 4, 4096, 0, 0, routing="duplicates", block_m=16),  # all the shared memory that a block may have
]
FEW_SMS = 2  # so that a block has several sub-chunks


def run_routing_plan() -> Iterator[str]:
    for case in PLANS:
        yield from _plans(case)
    with mock.patch("moe_kernels.backends.cuda.routing_plan.num_sms", lambda device: FEW_SMS):
        for case in PLANS[-2:]:
            yield from _plans(case)


def _plans(case: Case) -> Iterator[str]:
    indices = helpers.make_indices(case, torch.Generator().manual_seed(case.T))
    for ids in (torch.int32, torch.int64):
        found = ops.routing_plan(indices.to(ids).cuda(), case.E, case.block_m)
        assert_same_plan([back(each) for each in found], helpers.naive_plan(indices, case.E, case.block_m))
        yield f"{case} {ids}"


ROWS = [
    Case(1, 1, 1, 8, 8),
    Case(65, 3, 9, 200, 8, routing="sentinels"),
    Case(17, 2, 4, 40, 8, routing="all_dropped"),
    Case(33, 8, 16, 1032, 8, routing="duplicates"),
    Case(5, 10, 12, 72, 8),
]


def _rows() -> Iterator[tuple[int, Problem, Tensor | None]]:
    """Row number, problem and weights, all on the host."""
    for i, case in enumerate(ROWS):
        for j, dtype in enumerate((BF16, FP16, FP32)):
            p = Problem(case, dtype=dtype)
            yield i, p, (None, p.weights, p.weights.float())[(i + j) % 3]


def run_permute() -> Iterator[str]:
    for _, p, weights in _rows():
        out = back(test_permute.run(with_sent(p, "plan"), sent(p.x), sent(weights)))
        kept, w = out[: p.kept], torch.ones_like(p.weights) if weights is None else weights
        assert_close(kept, test_permute.scaled(p, p.x.double(), w.double()), test_permute.scaled(p, p.x, w))
        assert (out[p.kept :] == 0).all()
        yield f"{p.case} {p.x.dtype}"


def run_unpermute() -> Iterator[str]:
    for _, p, weights in _rows():
        out = back(ops.unpermute(sent(p.y), sent(p.plan.positions_TK), sent(weights)))
        inputs = p.y, weights, None
        assert_close(out, helpers.combine(p, *helpers.doubled(*inputs)), helpers.combine(p, *inputs))
        yield f"{p.case} {p.y.dtype}"


def run_combine() -> Iterator[str]:
    for i, p, weights in _rows():
        residual = p.residual if i % 2 else None
        y, w, r, out = map(sent, (p.y, weights, residual, torch.full_like(p.x, torch.nan)))
        out = back(test_combine.run(with_sent(p, "plan"), y, w, r, out))
        inputs = p.y, weights, residual
        assert_close(out, helpers.combine(p, *helpers.doubled(*inputs)), helpers.combine(p, *inputs))
        yield f"{p.case} {p.y.dtype}"


DECODES = [
    Case(1, 8, 64, 256, 72),
    Case(2, 1, 1, 256, 8),
    Case(7, 4, 64, 64, 200, routing="duplicates"),
    Case(40, 2, 4, 328, 136),
    Case(100, 3, 9, 200, 72, routing="sentinels"),
    Case(90, 2, 4, 72, 24, routing="all_to_one"),
    Case(17, 2, 4, 40, 8, routing="all_dropped"),
    *[Case(9, 2, 6, 136, 72, activation, interleaved=interleaved) for activation, interleaved in LAYOUTS],
]


def run_decode_experts() -> Iterator[str]:
    for i, case in enumerate(DECODES):
        p = Problem(case, dtype=(BF16, FP16)[i % 2])
        weights, indices = (p.weights, p.weights.float())[i // 2 % 2], p.indices.to((torch.int64, torch.int32)[i % 2])
        bias = i % 3 > 0
        moved = with_sent(p, "x", "w_gate_up", "bias_gate_up", "w_down", "bias_down")
        out = test_decode_experts.run(moved, bias=bias, indices=sent(indices), weights=sent(weights))
        biases = (p.bias_gate_up, p.bias_down) if bias else (None, None)
        inputs = p.x, weights, p.w_gate_up, p.w_down, *biases
        assert_close(back(out), soak.decoded(p, *helpers.doubled(*inputs)), soak.decoded(p, *inputs))
        yield f"{case} {p.x.dtype}"


class Route(NamedTuple):
    T: int
    E: int
    K: int
    dtype: torch.dtype
    scoring: str
    groups: tuple[int, int] = (1, 1)  # of experts, and how many of them are kept
    after: bool = False  # scores the chosen alone
    biased: bool = False


ROUTES = [
    Route(1, 8, 2, BF16, "softmax"),
    Route(65, 128, 8, FP32, "softmax"),
    Route(33, 256, 8, BF16, "sigmoid", (8, 4)),
    Route(130, 511, 22, FP32, "sigmoid"),
    Route(40, 96, 6, BF16, "sqrtsoftplus"),
    Route(17, 129, 4, FP32, "softmax", after=True),
    Route(40, 96, 6, FP16, "sqrtsoftplus", (4, 2), biased=True),
    Route(33, 257, 12, FP32, "sigmoid", biased=True),  # a bias that is padded, too
    Route(5, 1024, 32, FP16, "softmax"),  # the most experts, the most of them chosen
]


def padded_by_host(rows: Tensor, by: tuple[int, int], value: float = 0.0, pad: Callable = F.pad) -> Tensor:
    """``F.pad``, whose kernel on the GPU is torch's."""
    return pad(rows.cpu(), by, value=value).to(rows.device)


def run_topk_route() -> Iterator[str]:
    """Logits that lie apart and are the same numbers in every dtype: no rounding decides, with a bias of 0 or 2 too."""
    generator = torch.Generator().manual_seed(0)
    for route in ROUTES:
        T, E, K = route[:3]
        logits = ((torch.rand(T, E, generator=generator).argsort(-1) - E // 2) / 64).to(route.dtype)
        bias = torch.arange(E) % 3 // 2 * 2.0 if route.biased else None
        rule = route.scoring, route.after, True, 1e-20, 1.0
        forward = [logits, bias, K, *rule, *route.groups]
        with use_backend("reference"):
            weights, indices = ops.topk_route(*forward)
            # Not the weights themselves: renormalised, nearly all of their gradient would cancel.
            d_weights = torch.randn(T, K, generator=generator)
            some = indices.clone()
            some[::2, 0], some[1::3, 1] = -1, 2**40  # of no expert: nothing may be read or written there
            d_logits = ops.topk_route_bwd(d_weights, logits, some, *rule)
            exact = ops.topk_route_bwd(d_weights, logits.double(), some, *rule)
        with mock.patch.object(F, "pad", padded_by_host):  # rows whose length is no multiple of four
            found = (
                *ops.topk_route(*map(sent, forward)),
                ops.topk_route_bwd(*map(sent, (d_weights, logits, some)), *rule),
            )
        assert torch.equal(back(found[1]), indices), "other experts"
        assert_close(back(found[0]), weights.double(), weights, "weights")
        assert_close(back(found[2]), exact, d_logits, "d_logits")
        yield f"T{T}-E{E}-K{K}-{route.scoring} {logits.dtype}"


class Calls(TorchDispatchMode):
    """Counts the library's ops on the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in args)
        self.count += getattr(function, "namespace", None) == "moe_kernels" and on_gpu
        return function(*args, **(kwargs or {}))


class Run(NamedTuple):
    kind: str  # of the soak: tells whether its kernels run here
    cases: Callable[[], Iterator[str]]


RUNS = {
    "hopper": Run("hopper", run_hopper),
    "activations": Run("hopper", run_activations),
    "routing_plan": Run("routing_plan", run_routing_plan),
    "permute": Run("permute", run_permute),
    "unpermute": Run("unpermute", run_unpermute),
    "combine": Run("combine", run_combine),
    "decode_experts": Run("decode_experts", run_decode_experts),
    "topk_route": Run("topk_route", run_topk_route),
}


def main(names: Sequence[str]) -> None:
    start = time.perf_counter()
    with Calls() as calls, use_backend("cuda"):
        for name in names or RUNS:
            if (reason := soak.why_not(RUNS[name].kind)) is not None:
                print(f"{name}: left out, {reason}", flush=True)
                continue
            for case in RUNS[name].cases():
                print(f"{time.perf_counter() - start:6.1f} s  {name} {case}", flush=True)
    torch.cuda.synchronize()
    print(f"{calls.count} calls")


if __name__ == "__main__":
    main(sys.argv[1:])
