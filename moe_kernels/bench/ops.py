"""The rows of ops.json: GPU time of each op on each backend, at the size one layer gives it.

Products are timed in turn with their ``torch.bmm``: a product alone would run at another clock than one in a loop.
Those over the rows of experts have both backends in that loop, so that these can be compared. Other short ops are timed
by graph replay over rotating inputs, so that those that fit in L2 are cold, which flatters nobody: in a layer the
indices have just been written and are warm. Everything else is larger than L2. The ops of a router: ``router.py``.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import backends, use_backend
from moe_kernels.bench import ceilings
from moe_kernels.bench.layer import TIMES_YARDSTICK, Inaccurate, relative_l2
from moe_kernels.bench.measure import REPEATS, cold_copies, graph_us, median_ms, medians_in_turn_ms, waiting
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import Kind, Shape, routing
from moe_kernels.functional import RoutingPlan, routing_plan
from moe_kernels.ops import _library

FILE = "ops.json"
BACKENDS = ("triton", "cuda")
_GRAPH_BELOW_MS = 1
_WEIGHT_STD = 0.02
#: Of a loop with every backend in it; there are many of these.
_REPEATS_IN_TURN = REPEATS // 2


class Inputs(NamedTuple):
    """What the ops of one layer read: random, unit scale, bf16."""

    num_experts: int
    kind: Kind
    plan: RoutingPlan
    indices: Tensor
    weights: Tensor
    x: Tensor
    d_out: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    h: Tensor
    dh: Tensor
    a: Tensor
    y: Tensor
    bias_gate_up: Tensor | None
    bias_down: Tensor | None
    out: Tensor | None = None  # what an op that writes into a tensor it is given gets; by default a new one


class Op(NamedTuple):
    op: str  # its name in backends.OPS
    reads: tuple[str, ...]
    run: Callable[[Inputs], Sequence[Tensor]]
    product: str | None = None  # the part of the bound that it is
    width: str | None = None  # of a product of R rows by D and this: the shape's N or I
    moved: Callable[[Shape], int] | None = None  # useful bytes
    over: str | None = None  # the input that it writes its result over


def _routing_plan(i: Inputs) -> Sequence[Tensor]:
    return torch.ops.moe_kernels.routing_plan(i.indices, i.num_experts, i.plan.block_m)


def _gate_up(i: Inputs) -> Sequence[Tensor]:
    p = i.plan
    arguments = (p.offsets_E1, p.slots_R, p.tiles_2M, p.block_m, p.top_k, i.kind.activation, True, True)
    return torch.ops.moe_kernels.gate_up(i.x, i.w_gate_up, i.bias_gate_up, *arguments, *i.kind.options)


def _grouped_gemm(
    rows: Tensor, weights: Tensor, bias: Tensor | None, plan: RoutingPlan, trans_w: bool
) -> Sequence[Tensor]:
    arguments = (bias, plan.offsets_E1, plan.tiles_2M, plan.block_m, trans_w)
    return (torch.ops.moe_kernels.grouped_gemm(rows, weights, *arguments),)


def _d_activation(i: Inputs) -> Sequence[Tensor]:
    p = i.plan
    arguments = (i.weights, p.offsets_E1, p.slots_R, p.tiles_2M, p.block_m, i.kind.activation, *i.kind.options)
    return i.h, *torch.ops.moe_kernels.d_activation_(i.d_out, i.w_down, i.h, *arguments)


def _grouped_wgrad(lhs: Tensor, rhs: Tensor, gather: str, plan: RoutingPlan) -> Sequence[Tensor]:
    arguments = (plan.offsets_E1, plan.slots_R, plan.top_k, gather, False, lhs.dtype)
    return (torch.ops.moe_kernels.grouped_wgrad(lhs, rhs, *arguments)[0],)


def _combine(i: Inputs) -> Sequence[Tensor]:
    out = i.y.new_empty(i.x.shape) if i.out is None else i.out
    torch.ops.moe_kernels.combine(out, i.y, i.plan.positions_TK, i.weights, None)
    return (out,)


def _permute(i: Inputs) -> Sequence[Tensor]:
    return (torch.ops.moe_kernels.permute(i.x, None, i.plan.offsets_E1, i.plan.slots_R, i.plan.positions_TK),)


def _unpermute(i: Inputs) -> Sequence[Tensor]:
    return (torch.ops.moe_kernels.unpermute(i.y, i.plan.positions_TK, i.weights),)


def _rows_and_tokens(shape: Shape) -> int:
    return 2 * (shape.rows + shape.T) * shape.D


OPS = {
    "routing_plan": Op("routing_plan", ("indices",), _routing_plan, moved=lambda s: s.rows * (8 + 4 + 4)),
    "gate_up": Op("gate_up", ("x", "w_gate_up", "bias_gate_up"), _gate_up, "up", "N"),
    "grouped_gemm_down": Op(
        "grouped_gemm",
        ("a", "w_down", "bias_down"),
        lambda i: _grouped_gemm(i.a, i.w_down, i.bias_down, i.plan, True),
        "down",
        "I",
    ),
    "d_activation": Op("d_activation", ("d_out", "w_down", "h", "weights"), _d_activation, "d_a", "I", over="h"),
    "grouped_wgrad_down": Op(
        "grouped_wgrad", ("d_out", "a"), lambda i: _grouped_wgrad(i.d_out, i.a, "lhs", i.plan), "dw_down", "I"
    ),
    "grouped_gemm_dx": Op(
        "grouped_gemm", ("dh", "w_gate_up"), lambda i: _grouped_gemm(i.dh, i.w_gate_up, None, i.plan, False), "dx", "N"
    ),
    "grouped_wgrad_gate_up": Op(
        "grouped_wgrad", ("dh", "x"), lambda i: _grouped_wgrad(i.dh, i.x, "rhs", i.plan), "dw_gate_up", "N"
    ),
    "combine": Op("combine", ("y", "weights"), _combine, moved=_rows_and_tokens),
    "permute": Op("permute", ("x",), _permute, moved=_rows_and_tokens),
    "unpermute": Op("unpermute", ("y", "weights"), _unpermute, moved=_rows_and_tokens),
}


#: Measured on all backends at once: :func:`run_in_turn`.
ROW_PRODUCTS = ("gate_up", "grouped_gemm_down", "d_activation", "grouped_gemm_dx")


def cases() -> list[tuple[str, str]]:
    """(op, backend) of every other op, for every backend that has it."""
    return [
        (name, backend)
        for name, op in OPS.items()
        for backend in BACKENDS
        if name not in ROW_PRODUCTS and op.op in backends.IMPLEMENTS[backend]
    ]


def flops(op: Op, shape: Shape) -> int:
    """Useful ones of a product."""
    return 2 * shape.rows * shape.D * getattr(shape, op.width)


def why_not(session: Session, shape: Shape, name: str, backend: str) -> str | None:
    """The reason why the backend can't run the op here, or None."""
    dtype = None if name == "routing_plan" else torch.bfloat16
    problem = backends.Problem(torch.device(session.device), dtype, () if dtype is None else (shape.D, shape.I))
    return backends.why_not(backend, OPS[name].op, problem)


def run(session: Session, shape: Shape, name: str, backend: str) -> tuple[Callable[[], None], dict]:
    """Check, measure and record one op on one backend: a call for a clock on the host, and its row."""
    op, inputs = OPS[name], inputs_of(shape, session.device)
    check(name, shape, session.device, backend)
    if op.product:
        row = _in_turn(op, inputs, shape, session.device, [backend], REPEATS)[backend]
    else:
        with use_backend(backend):
            row = {"gpu_us": gpu_us(op, inputs)}
    if op.moved is not None:
        row["tb_per_s"] = op.moved(shape) / row["gpu_us"] / 1e6
        row["of_copy"] = row["tb_per_s"] * 1e12 / session.bytes_per_second
    row["default_backend"] = default_backend(op, inputs)
    call = functools.partial(_forced, backend, op, kept(op, inputs))
    return waiting(call), session.record(FILE, f"op/{name}/{shape.name}/{backend}", row)


def run_in_turn(session: Session, shape: Shape, name: str) -> tuple[Callable[[], None], dict]:
    """Check, measure and record a product on all backends that can run it: a call as it is by default, and its row."""
    op, inputs = OPS[name], inputs_of(shape, session.device)
    able = [backend for backend in BACKENDS if declined(op, inputs, backend) is None]
    for backend in able:
        check(name, shape, session.device, backend)
    rows = _in_turn(op, inputs, shape, session.device, able, _REPEATS_IN_TURN)
    default = default_backend(op, inputs)
    for backend, row in rows.items():
        row |= {"default_backend": default, "tokens": shape.T}
        rows[backend] = session.record(FILE, f"op/{name}/{shape.name}/{backend}", row)
    return waiting(functools.partial(_forced, default, op, kept(op, inputs))), rows[default]


def _forced(backend: str, op: Op, inputs: Inputs) -> Sequence[Tensor]:
    with use_backend(backend):
        return op.run(inputs)


def declined(op: Op, inputs: Inputs, backend: str) -> str | None:
    """The reason why the backend can't run the op on these inputs, or None; :func:`why_not` asks by the sizes alone."""
    try:
        _forced(backend, op, kept(op, inputs))
    except RuntimeError as error:
        if backends.DECLINED not in str(error):
            raise
        return str(error)
    return None


def default_backend(op: Op, inputs: Inputs) -> str:
    """The backend that runs the op here when none is forced."""
    with use_backend(None), Choices() as choices:
        op.run(kept(op, inputs))
    ((_, backend),) = choices.made
    return backend


class Choices(TorchDispatchMode):
    """Notes (op, backend) of each of our ops that is called inside."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _library.NAMESPACE:
            op = function._schema.name.partition("::")[2]
            self.made.append((op.rstrip("_"), _library.choice(op, *args).backend))
        return function(*args, **(kwargs or {}))


def _in_turn(
    op: Op, inputs: Inputs, shape: Shape, device: str, names: Iterable[str], repeats: int
) -> dict[str, dict[str, float]]:
    """By backend the figures of a product, in turn with its ``torch.bmm``: all at the clock that their power leaves."""
    restored = {backend: _restored(op, inputs) for backend in names}
    runs = {backend: functools.partial(_forced, backend, op, copy) for backend, (copy, _) in restored.items()}
    restores = [restore for _, restore in restored.values() if restore is not None]

    def prepare() -> None:
        for restore in restores:
            restore()

    runs |= ceilings.products(shape, op.product, device=device)
    times = medians_in_turn_ms(runs, repeats, prepare)
    bmm_ms = times[op.product] * ceilings.padding(inputs.plan.tokens_per_expert_E)
    return {
        backend: {
            "gpu_us": times[backend] * 1e3,
            "tflops": flops(op, shape) / times[backend] / 1e9,
            "of_bmm": bmm_ms / times[backend],
        }
        for backend in restored
    }


def _restored(op: Op, inputs: Inputs) -> tuple[Inputs, Callable[[], object] | None]:
    """Inputs that the op may write over, and what gives them back: what it leaves there is ever smaller."""
    copy = kept(op, inputs)
    if op.over is None:
        return copy, None
    return copy, functools.partial(getattr(copy, op.over).copy_, getattr(inputs, op.over))


def gpu_us(op: Op, inputs: Inputs) -> float:
    """Of an op by itself, in µs."""
    copy, restore = _restored(op, inputs)
    if restore is not None:
        return median_ms(lambda: op.run(copy), prepare=restore) * 1e3
    if median_ms(lambda: op.run(inputs), repeats=3) >= _GRAPH_BELOW_MS:
        return median_ms(lambda: op.run(inputs)) * 1e3
    return graph_us([functools.partial(op.run, each) for each in cold(inputs, op.reads)])


def cold(inputs: Inputs, reads: Sequence[str]) -> list[Inputs]:
    """The inputs as often, in memory of their own, as it takes for each to have left L2 when its turn comes again."""
    tensors = _given(inputs, reads)
    size = sum(tensor.nbytes for tensor in tensors.values())
    l2 = torch.cuda.get_device_properties(inputs.x.device).L2_cache_size
    others = range(cold_copies(size, l2) - 1)
    copies = ({name: tensor.clone() for name, tensor in tensors.items()} for _ in others)
    return [inputs, *(inputs._replace(**each) for each in copies)]


def _given(inputs: Inputs, reads: Sequence[str]) -> dict[str, Tensor]:
    """What an op reads, but for the biases that a layer doesn't have."""
    return {name: tensor for name in reads if (tensor := getattr(inputs, name)) is not None}


def check(name: str, shape: Shape, device: str, backend: str) -> None:
    """Within twice the error of plain torch in bf16, or of one rounding where that makes none; integers equal."""
    truth, limits = _expected(name, shape, device)
    op, inputs = OPS[name], inputs_of(shape, device)
    poisoned = torch.full_like(inputs.x, torch.nan)  # what isn't written can't pass for right
    _poison(_forced(backend, op, kept(op, inputs)._replace(out=poisoned)))
    found = _forced(backend, op, kept(op, inputs)._replace(out=poisoned))
    for place, (value, true, limit) in enumerate(zip(found, truth, limits, strict=True)):
        which = f"op/{name}/{shape.name}/{backend}: result {place}"
        if limit is None:
            if not torch.equal(_meaning(name, value), _meaning(name, true)):
                raise Inaccurate(f"{which} is wrong")
        elif not (error := relative_l2(value, true)) <= limit:  # NaN too; a copy is exact
            raise Inaccurate(f"{which} has a relative error of {error:.2e}, allowed {limit:.2e}")


def _poison(results: Sequence[Tensor]) -> None:
    """The next call gets their memory, which may hold what another backend made."""
    for result in results:
        if result.is_floating_point():
            result.fill_(torch.nan)


def _meaning(name: str, value: Tensor) -> Tensor:
    """The row of an unused tile of a plan means nothing."""
    return torch.where(value[:1] < 0, -1, value) if name == "routing_plan" and value.shape[0] == 2 else value


def _last(make: Callable) -> Callable:
    """Keeps what ``make`` gave last, and gives that up before it makes another: both may not fit."""
    results = {}

    @functools.wraps(make)
    def last(*arguments):
        if arguments not in results:
            results.clear()
            results[arguments] = make(*arguments)
        return results[arguments]

    last.forget = results.clear
    return last


def forget() -> None:
    """Give the memory of the last shape back."""
    inputs_of.forget()
    _expected.forget()


@_last
def _expected(name: str, shape: Shape, device: str) -> tuple[Sequence[Tensor], list[float | None]]:
    """What fp32 gives on the same bf16 numbers, and the error allowed of each result; None for integers."""
    op, inputs = OPS[name], inputs_of(shape, device)
    floats = {name: tensor for name, tensor in _given(inputs, op.reads).items() if tensor.is_floating_point()}
    with use_backend("reference"):
        truth = op.run(inputs._replace(**{name: tensor.float() for name, tensor in floats.items()}))
        plain = op.run(kept(op, inputs))
    limits = [
        TIMES_YARDSTICK * max(relative_l2(value, true), relative_l2(true.bfloat16(), true))
        if true.is_floating_point()
        else None
        for value, true in zip(plain, truth, strict=True)
    ]
    return truth, limits


def kept(op: Op, inputs: Inputs) -> Inputs:
    """Inputs that the op may write over."""
    return inputs if op.over is None else inputs._replace(**{op.over: getattr(inputs, op.over).clone()})


@_last
def inputs_of(shape: Shape, device: str) -> Inputs:
    torch.manual_seed(0)
    weights, indices = routing("uniform", shape, device)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    def weights_of(width: int, reduced: int) -> Tensor:
        w = random(E, reduced, width).mT if shape.kind.transposed else random(E, width, reduced)
        return w.mul_(_WEIGHT_STD)

    def bias_of(width: int) -> Tensor | None:
        return random(E, width).mul_(_WEIGHT_STD) if shape.kind.biases else None

    R, D, I, N, E = shape.rows, shape.D, shape.I, shape.N, shape.E  # noqa: E741
    return Inputs(
        num_experts=E,
        kind=shape.kind,
        plan=routing_plan(indices, E),
        indices=indices,
        weights=weights,
        x=random(shape.T, D),
        d_out=random(shape.T, D),
        w_gate_up=weights_of(N, D),
        w_down=weights_of(D, I),
        h=random(R, N),
        dh=random(R, N),
        a=random(R, I),
        y=random(R, D),
        bias_gate_up=bias_of(N),
        bias_down=bias_of(D),
    )
