"""What the tests share: the naive truths, random routings and problems; tolerances come from tests/tolerances.py.

Nothing here calls the library's arithmetic: the plan is a Python sort, the formulas are plain torch and run in the
dtype of what they are given (fp64 for the truth, bf16 for "what plain torch would do"). Shape letters as in the
library: T tokens, K experts per token, R = T*K routed rows, E experts, D hidden, I intermediate, N = 2I or I.
"""

import collections
import itertools
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.functional import RoutingPlan
from tests.tolerances import assert_close, bitwise_equal, relative_l2  # noqa: F401  they are helpers too

# Cases


class Case(NamedTuple):
    T: int
    K: int
    E: int
    D: int
    I: int  # noqa: E741  the library's letter
    activation: str = "swiglu"
    routing: str = "uniform"
    block_m: int = 64
    interleaved: bool = False

    def __str__(self):
        sizes = f"T{self.T}-K{self.K}-E{self.E}-D{self.D}-I{self.I}-{self.activation}"
        return f"{sizes}-{self.routing}-m{self.block_m}" + "-interleaved" * self.interleaved

    @property
    def options(self) -> tuple[float | None, float | None, bool]:
        """The arguments alpha, limit, interleaved."""
        return *NUMBERS.get(self.activation, (None, None)), self.interleaved

    @property
    def N(self) -> int:
        return self.I * (2 if self.activation in GATED else 1)


class Target(NamedTuple):
    """Where an op test runs."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self):
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


# Activations, written out

GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamp_before", "swiglu_clamp_after")
PLAIN = ("relu2", "gelu", "gelu_tanh", "silu")
ACTIVATIONS = GATED + PLAIN
#: (alpha, limit): unit-scale data passes these limits often, and in half precision meets them exactly.
NUMBERS = {"swiglu_oai": (1.702, 1.25), "swiglu_clamp_before": (None, 0.75), "swiglu_clamp_after": (None, 0.5)}
#: (activation, interleaved)
LAYOUTS = [(name, False) for name in ACTIVATIONS] + [(name, True) for name in GATED]


def activate(h: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    if activation not in GATED:
        z, up = h, None
    elif interleaved:
        z, up = h[..., 0::2], h[..., 1::2]
    else:
        z, up = h.chunk(2, -1)
    alpha, limit = NUMBERS.get(activation, (None, None))
    if limit is not None:
        up = up.clamp(-limit, limit)
    match activation:
        case "swiglu_oai":
            z = z.clamp(max=limit)
            return (up + 1) * z * torch.sigmoid(alpha * z)
        case "swiglu_clamp_before":
            z = z.clamp(max=limit)
            a = z * torch.sigmoid(z)
        case "swiglu_clamp_after":
            a = (z * torch.sigmoid(z)).clamp(max=limit)
        case "swiglu" | "silu":
            a = z * torch.sigmoid(z)
        case "geglu" | "gelu":
            a = 0.5 * z * (1 + torch.erf(z * 0.5**0.5))
        case "geglu_tanh" | "gelu_tanh":
            a = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        case "relu2":
            a = torch.where(z > 0, z, torch.zeros_like(z)) ** 2
    return a if up is None else a * up


# Routing

ROUTINGS = ("uniform", "all_to_one", "empty", "sentinels", "duplicates", "all_dropped")
#: Beside those, where many random cases are drawn: experts wanted as words of a language are, p ~ rank ** -1.2.
SKEWED = (*ROUTINGS, "zipf")


def make_indices(case: Case, generator: torch.Generator) -> Tensor:
    """int64 [T, K] expert ids."""
    T, K, E = case.T, case.K, case.E
    repeated = torch.randint(0, E, (T, K), generator=generator)
    keys = torch.rand(T, E, generator=generator) if K <= E else None  # drawn by all, though only some sort them
    match case.routing:
        case "uniform":
            return _first(K, keys, repeated)
        case "all_to_one":  # every slot of every token: K rows of one expert share a token
            return torch.full((T, K), E // 2)
        case "empty":  # first, last and every odd expert get nothing
            used = torch.arange(2, max(E - 1, 3), 2).clamp(max=E - 1)
            return used[torch.randint(0, len(used), (T, K), generator=generator)]
        case "sentinels":  # -1 and ids from E up both mean "no expert"; token 0 loses every slot
            outside = torch.tensor([-1, E, E + 1, -(2**31), 2**31 - 1])
            outside = outside[torch.randint(0, len(outside), (T, K), generator=generator)]
            drop = torch.rand(T, K, generator=generator) < 0.3
            drop[:1] = True
            return torch.where(drop, outside, _first(K, keys, repeated))
        case "duplicates":
            return repeated
        case "zipf":  # the first K of a draw without replacement, by exponential clocks
            clocks = -torch.rand(T, E, generator=generator).log() * torch.arange(1, E + 1) ** 1.2
            return _first(K, clocks if K <= E else None, repeated)
        case "all_dropped":
            return torch.where(repeated % 2 == 0, -1, E)
    raise ValueError(case.routing)


def _first(K: int, keys: Tensor | None, otherwise: Tensor) -> Tensor:
    """The columns of the K smallest keys in each row, in their order."""
    return otherwise if keys is None else keys.topk(K, largest=False).indices


class Rows(NamedTuple):
    """The kept rows in expert order, and the slots nobody wants, both as Python finds them."""

    experts: list[int]
    slots: list[int]
    dropped: list[int]


def naive_rows(indices_TK: Tensor, num_experts: int) -> Rows:
    ids = indices_TK.flatten().tolist()
    kept = sorted((e, slot) for slot, e in enumerate(ids) if 0 <= e < num_experts)  # slots ascend: a stable sort
    return Rows([e for e, _ in kept], [s for _, s in kept], [s for s, e in enumerate(ids) if not 0 <= e < num_experts])


def naive_plan(indices_TK: Tensor, num_experts: int, block_m: int, rows: Rows | None = None) -> RoutingPlan:
    """``rows``: those of these indices, where they are known."""
    rows = rows or naive_rows(indices_TK, num_experts)
    counts = collections.Counter(rows.experts)
    offsets = [0, *itertools.accumulate(counts[e] for e in range(num_experts))]
    positions = [-1] * indices_TK.numel()
    for position, slot in enumerate(rows.slots):
        positions[slot] = position
    tiles, waiting = [], []
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        own = [(e, first) for first in range(start, end, block_m)]
        if len(own) % 2:  # the last one waits for another expert's
            waiting.append(own.pop())
        tiles += own
        if len(waiting) == 2:
            tiles += waiting
            waiting = []
    tiles += waiting
    bound = indices_TK.numel() // block_m + min(indices_TK.numel(), num_experts)
    tiles += [(-1, 0)] * (bound - len(tiles))

    def int32(values):
        return torch.tensor(values, dtype=torch.int32, device=indices_TK.device)

    return RoutingPlan(
        int32(offsets),
        int32(rows.slots + rows.dropped),
        int32(positions).reshape(indices_TK.shape),
        int32(tiles).reshape(-1, 2).T.contiguous(),
        block_m,
    )


# Problems


class Problem:
    """Random unit-scale tensors of a case and everything the formulas need to know about its routing.

    The tensors come from ``generator``, by default one on the CPU, with which they are the same on every device; one
    on the GPU is faster.
    """

    def __init__(
        self,
        case: Case,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        self.case = case
        chooser = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
        generator = chooser if generator is None else generator

        def normal(*shape, scale=1.0):
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device=generator.device)
            return (numbers * scale).to(device, dtype)

        def moved(tensor):
            return tensor.to(device, non_blocking=True)  # so few bytes need not wait for the GPU

        T, K, E, D, I, N = case.T, case.K, case.E, case.D, case.I, case.N  # noqa: E741
        indices = make_indices(case, chooser)
        self.indices = moved(indices)
        self.rows = naive_rows(indices, E)
        *tensors, block_m = naive_plan(indices, E, case.block_m, self.rows)
        self.plan = RoutingPlan(*map(moved, tensors), block_m)
        self.kept = len(self.rows.slots)
        counts = collections.Counter(self.rows.experts)
        ends = itertools.accumulate(counts[e] for e in range(E))
        #: (expert, its rows), without experts that have none
        self.spans = [(e, slice(end - counts[e], end)) for e, end in enumerate(ends) if counts[e]]
        self.slot_r = moved(torch.tensor(self.rows.slots, dtype=torch.int64))
        self.token_r = self.slot_r // max(K, 1)

        self.x = normal(T, D)
        self.w_gate_up = normal(E, N, D, scale=D**-0.5)
        self.bias_gate_up = normal(E, N)
        self.w_down = normal(E, D, I, scale=I**-0.5)
        self.bias_down = normal(E, D)
        self.weights = normal(T, K)
        self.d_out = normal(T, D)
        self.h = normal(T * K, N)
        self.a = normal(T * K, I)
        self.y = normal(T * K, D)
        self.residual = normal(T, D)
        for unowned in (self.h, self.a, self.y):  # nothing may be read past the last expert's rows
            unowned[self.kept :] = torch.nan


# The formulas: kept rows only, in the dtype of what they are given


def gate_up(p: Problem, x, w, bias) -> tuple[Tensor, Tensor]:
    h = grouped_gemm(p, x[p.token_r], w, bias, True)
    return h, activate(h, p.case.activation, p.case.interleaved)


def grouped_gemm(p: Problem, a, w, bias, trans_w) -> Tensor:
    y = a.new_zeros(p.kept, w.shape[1 if trans_w else 2])
    for e, rows in p.spans:
        y[rows] = a[rows] @ (w[e].T if trans_w else w[e])
        if bias is not None:
            y[rows] += bias[e]
    return y


def d_activation(p: Problem, d_out, w_down, h, weights) -> tuple[Tensor, Tensor, Tensor]:
    """dH, A', dS [T, K]"""
    with torch.enable_grad():
        h = h[: p.kept].detach().requires_grad_()
        a = activate(h, p.case.activation, p.case.interleaved)
    d_a = grouped_gemm(p, d_out[p.token_r], w_down, None, False)
    s = weights.flatten()[p.slot_r, None].to(a.dtype)
    (dh,) = torch.autograd.grad(a, h, s * d_a)
    a = a.detach()
    d_weights = a.new_zeros(weights.numel())
    d_weights[p.slot_r] = (d_a * a).sum(-1)
    return dh, s * a, d_weights.view(weights.shape)


def grouped_wgrad(p: Problem, lhs, rhs) -> tuple[Tensor, Tensor]:
    """``lhs`` and ``rhs`` are rows in expert order here: the test gathers."""
    E = p.case.E
    dw, db = lhs.new_zeros(E, lhs.shape[1], rhs.shape[1]), lhs.new_zeros(E, lhs.shape[1])
    for e, rows in p.spans:
        dw[e] = lhs[rows].T @ rhs[rows]
        db[e] = lhs[rows].sum(0)
    return dw, db


def combine(p: Problem, y, weights, residual) -> Tensor:
    out = y.new_zeros(p.case.T, y.shape[1]) if residual is None else residual.clone()
    y = torch.cat([y[: p.kept], torch.zeros_like(out[:1])])  # what position -1 reads
    for k, positions in enumerate(p.plan.positions_TK.long().unbind(1)):
        rows = y[positions]
        out += rows if weights is None else torch.where(positions < 0, 0, weights[:, k]).to(y.dtype)[:, None] * rows
    return out


def naive_moe(
    x, weights, indices, w_gate_up, w_down, activation="swiglu", bias_gate_up=None, bias_down=None, interleaved=False
) -> Tensor:
    """The layer as its definition reads, one token and one expert at a time; autograd does the rest."""
    out = []
    for t, ids in enumerate(indices.tolist()):
        total = x.new_zeros(w_down.shape[1])
        for k, e in enumerate(ids):
            if not 0 <= e < w_gate_up.shape[0]:
                continue
            h = w_gate_up[e] @ x[t] + (0 if bias_gate_up is None else bias_gate_up[e])
            y = w_down[e] @ activate(h, activation, interleaved) + (0 if bias_down is None else bias_down[e])
            total = total + weights[t, k].to(y.dtype) * y
        out.append(total)
    nothing = x * 0 + weights.sum() * 0  # a token without experts is zero and still has a gradient
    return torch.stack(out) + nothing.to(x.dtype) if out else nothing


def doubled(*tensors):
    """The same values in fp64."""
    return tuple(t.double() if isinstance(t, Tensor) else t for t in tensors)


# Places in memory


def shifted(tensor: Tensor) -> Tensor:
    """The same, contiguous, three elements into memory with garbage all around: at no multiple of 16 bytes."""
    size = tensor.numel()
    return _garbage(tensor, size + 8)[3 : 3 + size].view(tensor.shape).copy_(tensor)


def odd_rows(tensor: Tensor) -> Tensor:
    """The same; its rows begin as badly, and lie an odd number of elements apart with garbage between."""
    *rows, width = tensor.shape
    return _garbage(tensor, *rows, (width + 6) | 1)[..., 3 : 3 + width].copy_(tensor)


def _garbage(like: Tensor, *shape: int) -> Tensor:
    return like.new_full(shape, torch.nan if like.is_floating_point() else 10**6)


# Arguments of the ops


def op_arguments(op: str, p: Problem) -> tuple:
    """Valid arguments of ``torch.ops.moe_kernels.<op>`` for a problem, in the order of its schema."""
    case, plan = p.case, p.plan
    offsets, slots, positions, tiles, block_m = plan
    logits = F.pad(p.x, (0, max(0, case.E - case.D)))[:, : case.E].contiguous()
    match op:
        case "routing_plan":
            return p.indices, case.E, block_m
        case "topk_route":
            return logits, None, min(case.K, case.E), "softmax", False, True, 0.0, 1.0, 1, 1
        case "topk_route_bwd":
            indices = logits.argsort(-1)[:, : case.K].contiguous()
            return p.weights[:, : indices.shape[1]].contiguous(), logits, indices, "softmax", False, True, 0.0, 1.0
        case "permute":
            return p.x, p.weights, offsets, slots, positions
        case "unpermute":
            return p.y, positions, p.weights
        case "gate_up":
            plan_arguments = (offsets, slots, tiles, block_m, case.K, case.activation)
            return (p.x, p.w_gate_up, p.bias_gate_up, *plan_arguments, True, True, *case.options)
        case "grouped_gemm":
            return p.a, p.w_down, p.bias_down, offsets, tiles, block_m, True
        case "d_activation" | "d_activation_":
            plan_arguments = (offsets, slots, tiles, block_m, case.activation)
            return p.d_out, p.w_down, p.h, p.weights, *plan_arguments, *case.options
        case "grouped_wgrad":
            return p.d_out, p.a, offsets, slots, case.K, "lhs", True, p.x.dtype
        case "grouped_wgrad_":
            return p.d_out, p.a, offsets, slots, case.K, "lhs", p.w_down.clone()
        case "combine":
            return torch.full_like(p.x, torch.nan), p.y, positions, p.weights, p.residual
        case "decode_experts":
            weights = p.w_gate_up, p.bias_gate_up, p.w_down, p.bias_down
            return p.x, p.indices, p.weights, *weights, case.activation, *case.options
    raise ValueError(op)


OPS = (
    "routing_plan",
    "topk_route",
    "topk_route_bwd",
    "permute",
    "unpermute",
    "gate_up",
    "grouped_gemm",
    "d_activation",
    "d_activation_",
    "grouped_wgrad",
    "grouped_wgrad_",
    "combine",
    "decode_experts",
)
