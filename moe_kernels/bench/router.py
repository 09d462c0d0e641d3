"""The rows of ops.json that belong to routers: ``topk_route``, its backward, and the whole router with its product.

Three models' routers at their own sizes and 16384 tokens. The ops alone are timed cold, as other short ops are. The
whole router is what the adapters of Transformers run: the product in the dtype that the family keeps its logits in,
then ``topk_route``, which finds them in L2. Its graph and that of the product by cuBLAS, bf16 in and fp32 out, are
replayed in turn.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels import backends, use_backend
from moe_kernels.bench import ops
from moe_kernels.bench.layer import TIMES_YARDSTICK, Inaccurate, relative_l2
from moe_kernels.bench.measure import capture, medians_in_turn_ms, waiting
from moe_kernels.bench.session import Session
from moe_kernels.functional import topk_route
from moe_kernels.functional._router_logits import router_logits

FILE = ops.FILE
_BF16, _FP32 = torch.bfloat16, torch.float32
#: Scores in fp32, or sums of two, that are closer may come in another order: some roundings of numbers up to 2.
_TIE = 2e-6
#: Logits in fp32 must be this much closer than those in bf16. Tensor cores drop low bits of long sums.
_OF_BF16 = 0.1
_CALLS = 40  # in a graph that is replayed in turn, so that its own start does not count


class Router(NamedTuple):
    """A router that renormalises its weights, as these models' do."""

    name: str
    T: int
    D: int
    E: int
    K: int
    dtype: torch.dtype  # of logits and weights
    scoring: str
    biased: bool = False  # a bias is added to the scores of a sigmoid, to choose
    epsilon: float = 0.0
    scale: float = 1.0
    groups: tuple[int, int] = (1, 1)  # how many, and how many are kept

    @property
    def rule(self) -> dict[str, object]:
        """Arguments of ``functional.topk_route``."""
        return {
            "scoring": self.scoring,
            "renormalize": True,
            "epsilon": self.epsilon,
            "scale": self.scale,
            "num_groups": self.groups[0],
            "top_groups": self.groups[1],
        }


ROUTERS = {
    router.name: router
    for router in (
        Router("qwen3-30b", 16384, 2048, 128, 8, _BF16, "softmax"),
        Router("deepseek-v3", 16384, 7168, 256, 8, _FP32, "sigmoid", True, 1e-20, 2.5, (8, 4)),
        Router("nemotron-3-super", 16384, 4096, 512, 22, _FP32, "sigmoid", True, 1e-20, 5.0),
    )
}


class Inputs(NamedTuple):
    router: Router
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor
    indices: Tensor
    d_weights: Tensor


def choose(i: Inputs, logits: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weights and indices; the weights in the router's dtype unless another is asked for."""
    rule = i.router.rule | {"weights_dtype": dtype or i.router.dtype}
    return topk_route(logits, i.router.K, selection_bias_E=i.bias, **rule)


def _topk_route(i: Inputs) -> Sequence[Tensor]:
    return choose(i, i.logits)


def _topk_route_bwd(i: Inputs) -> Sequence[Tensor]:
    how = i.router.scoring, False, True, i.router.epsilon, i.router.scale
    return (torch.ops.moe_kernels.topk_route_bwd(i.d_weights, i.logits, i.indices, *how),)


def _router(i: Inputs) -> Sequence[Tensor]:
    """(logits, weights, indices)"""
    logits = router_logits(i.x, i.weight) if i.router.dtype == _FP32 else F.linear(i.x, i.weight)
    return logits, *choose(i, logits)


def matmul(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """What a router is held against."""
    return torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)


def _bytes(r: Router) -> int:
    """Logits in, weights and indices out."""
    return r.T * (r.E * r.dtype.itemsize + r.K * (r.dtype.itemsize + 8))


def _bytes_bwd(r: Router) -> int:
    """Indices and their gradients in, gradients of all logits out; a softmax reads all logits, other scores the K."""
    reads = r.E if r.scoring == "softmax" else r.K
    return r.T * ((r.E + reads) * r.dtype.itemsize + r.K * (r.dtype.itemsize + 8))


OPS = {
    "topk_route": ops.Op("topk_route", ("logits",), _topk_route, moved=_bytes),
    "topk_route_bwd": ops.Op("topk_route_bwd", ("d_weights", "logits", "indices"), _topk_route_bwd, moved=_bytes_bwd),
    "router": ops.Op("topk_route", ("x", "weight"), _router),
}


def cases() -> list[tuple[Router, str, str]]:
    """(router, op, backend) for every backend that has it."""
    return [
        (router, name, backend)
        for router in ROUTERS.values()
        for name, op in OPS.items()
        for backend in ops.BACKENDS
        if op.op in backends.IMPLEMENTS[backend]
    ]


def why_not(session: Session, router: Router, name: str, backend: str) -> str | None:
    """The reason why the backend can't run the op here, or None."""
    problem = backends.Problem(torch.device(session.device), router.dtype, ())
    return backends.why_not(backend, OPS[name].op, problem)


def run(session: Session, router: Router, name: str, backend: str) -> tuple[Callable[[], None], dict]:
    """Check, measure and record one op on one backend: a call for a clock on the host, and its row."""
    op, inputs = OPS[name], inputs_of(router, session.device)
    check(name, inputs, backend)
    with torch.no_grad(), use_backend(backend):
        row = {"gpu_us": ops.gpu_us(op, inputs)} if op.moved else _beside_matmul(inputs)
    if op.moved is not None:
        row["tb_per_s"] = op.moved(router) / row["gpu_us"] / 1e6
        row["of_copy"] = row["tb_per_s"] * 1e12 / session.bytes_per_second
    row["default_backend"] = ops.default_backend(op, inputs)

    def call() -> None:
        with use_backend(backend):
            op.run(inputs)

    return waiting(call), session.record(FILE, f"op/{name}/{router.name}/{backend}", row)


# The whole router


def _beside_matmul(inputs: Inputs) -> dict[str, float]:
    """Forward beside the product; forward and backward beside the three products by cuBLAS, all of bf16 numbers."""
    each, d_logits = ops.cold(inputs, OPS["router"].reads), inputs.logits.bfloat16()
    times = _in_turn_us(
        {
            "router": [functools.partial(_router, i) for i in each],
            "matmul": [functools.partial(matmul, i.x, i.weight) for i in each],
            "router step": [functools.partial(_router_step, i) for i in each],
            "matmul step": [functools.partial(_matmul_step, i, d_logits) for i in each],
        }
    )
    return {
        "gpu_us": times["router"],
        "matmul_us": times["matmul"],
        "over_matmul": times["router"] / times["matmul"],
        "step_us": times["router step"],
        "step_over_matmul": times["router step"] / times["matmul step"],
    }


def _router_step(i: Inputs) -> Sequence[Tensor]:
    """Results, and the gradients of x and of the weight."""
    with torch.enable_grad():
        leaves = i.x.detach().requires_grad_(), i.weight.detach().requires_grad_()
        logits, weights, indices = _router(i._replace(x=leaves[0], weight=leaves[1]))
        return logits, weights, indices, *torch.autograd.grad(weights, leaves, i.d_weights)


def _matmul_step(i: Inputs, d_logits: Tensor) -> Sequence[Tensor]:
    return matmul(i.x, i.weight), d_logits @ i.weight, d_logits.T @ i.x


def _in_turn_us(runs: Mapping[str, Sequence[Callable[[], object]]]) -> dict[str, float]:
    """GPU time of one call of each, on different inputs in a CUDA graph; the graphs share the clocks of the GPU."""
    graphs, calls = {}, {}
    for name, each in runs.items():
        repeated = [*each] * math.ceil(_CALLS / len(each))

        def run_all(repeated=repeated) -> None:
            for call in repeated:
                call()

        graphs[name], calls[name] = capture(run_all)[0].replay, len(repeated)
    return {name: ms * 1e3 / calls[name] for name, ms in medians_in_turn_ms(graphs).items()}


# The check


def check(name: str, inputs: Inputs, backend: str) -> None:
    """Experts equal, but where a rounding decides; the rest within twice the error of plain torch in that dtype, or of
    one rounding to bf16."""
    label = f"op/{name}/{inputs.router.name}/{backend}"
    with torch.no_grad(), use_backend(backend):
        found = OPS[name].run(inputs)
    with torch.no_grad(), use_backend("reference"):
        if name == "topk_route_bwd":
            floats = {"logits": inputs.logits.float(), "d_weights": inputs.d_weights.float()}
            (true,), (plain,) = _topk_route_bwd(inputs._replace(**floats)), _topk_route_bwd(inputs)
            _within(f"{label}: d_logits", found[0], true, plain)
        elif name == "router":
            _check_logits(label, inputs, found[0])
            _check_choice(label, inputs, *found)
        else:
            _check_choice(label, inputs, inputs.logits, *found)


def _check_logits(label: str, inputs: Inputs, logits: Tensor) -> None:
    true, plain = inputs.x.float() @ inputs.weight.float().T, F.linear(inputs.x, inputs.weight)
    _within(f"{label}: logits", logits, true, plain, _OF_BF16 if inputs.router.dtype == _FP32 else 1)


def _check_choice(label: str, inputs: Inputs, logits: Tensor, weights: Tensor, indices: Tensor) -> None:
    true, experts = choose(inputs, logits.float(), _FP32)
    plain, _ = choose(inputs, logits)
    sure = decided(inputs, logits)
    if not torch.equal(indices[sure], experts[sure]):
        raise Inaccurate(f"{label}: {(indices != experts)[sure].any(-1).sum()} tokens have other experts")
    _within(f"{label}: weights", weights[sure], true[sure], plain[sure])


def _within(label: str, value: Tensor, true: Tensor, plain: Tensor, share: float = 1) -> None:
    limit = share * TIMES_YARDSTICK * max(relative_l2(plain, true), relative_l2(true.bfloat16(), true))
    if not (error := relative_l2(value, true)) <= limit:  # NaN too
        raise Inaccurate(f"{label} have a relative error of {error:.2e}, allowed {limit:.2e}")


def decided(inputs: Inputs, logits: Tensor) -> Tensor:
    """[T] bool: the tokens whose experts hang on no rounding. Without a bias all: logits are compared as they are,
    and equal ones by index. With one, scores are, and those of two backends differ in the last bits."""
    router = inputs.router
    if not router.biased:
        return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    choice = logits.double().sigmoid() + inputs.bias
    sure = torch.ones_like(choice[:, 0], dtype=torch.bool)
    groups, kept = router.groups
    if groups > 1:
        grouped = choice.view(len(choice), groups, -1)
        merit = grouped.topk(2).values.sum(-1).sort(-1, descending=True)
        sure = merit.values[:, kept - 1] - merit.values[:, kept] > _TIE
        lost = torch.zeros_like(merit.values, dtype=torch.bool).scatter_(1, merit.indices[:, kept:], True)
        choice = grouped.masked_fill(lost[..., None], -torch.inf).view_as(choice)
    best = choice.topk(router.K + 1).values
    return sure & ((best[:, :-1] - best[:, 1:]).amin(-1) > _TIE)


@functools.lru_cache(maxsize=1)
def inputs_of(router: Router, device: str) -> Inputs:
    """Random tokens of unit scale, weights of std 0.02, a bias of std 0.1; the logits are those of the product."""
    torch.manual_seed(0)
    x = torch.randn(router.T, router.D, device=device, dtype=_BF16)
    weight = torch.randn(router.E, router.D, device=device, dtype=_BF16) * 0.02
    bias = 0.1 * torch.randn(router.E, device=device) if router.biased else None
    empty = torch.empty(0, device=device)
    inputs = Inputs(router, x, weight, bias, empty, empty, empty)
    with torch.no_grad(), use_backend("reference"):
        logits, weights, indices = _router(inputs)
    return inputs._replace(logits=logits, indices=indices, d_weights=torch.randn_like(weights))
