"""Offline tuner of the Triton tile table: neighbours of each row are compiled, checked and timed on this GPU.

A row is tried by putting it into the table that the kernels read, so what is timed is what the library would launch.
Nothing here runs when the library is used: a better row is written into ``backends/triton/configs.py``.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from moe_kernels import use_backend
from moe_kernels.backends.triton import configs
from moe_kernels.bench import compiling, ops, tile_rows
from moe_kernels.bench.compiling import Compiled
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.shapes import Shape
from moe_kernels.bench.tile_rows import TUNED, Key
from moe_kernels.functional.routing_plan import MAX_BLOCK_M

DEVICE = "cuda"
#: bf16 and fp16 share a row; fp32 runs on the slow units, where tiles matter little.
_ELEMENT_SIZE = 2
#: A row is replaced by one that takes this share of its time or less.
WORTH = 0.98
#: Every candidate is timed once, those within this factor of the best in more rounds, in turn: all see the same heat.
_NEAR, _ROUNDS = 1.1, 5
#: What the hardware keeps for itself of each program's shared memory.
_RESERVED = 1024

#: (things, what to say of each, how many) -> the things; what shows how far it is.
Progress = Callable[[Iterable, Callable[..., str], int], Iterator]


@dataclass(eq=False)
class Trial:
    """One candidate for one row, and what became of it."""

    key: Key
    row: configs.Tiles
    current: bool
    dropped: str | None = None  # why it is out
    flops: int = 0  # of one call of each benchmark that runs on the row
    ms: float = 0.0  # of the same
    spans_us: list[float] = field(default_factory=list)  # of the benchmark at hand

    @property
    def tflops(self) -> float:
        return self.flops / self.ms / 1e9


def tune(shapes: Sequence[Shape], names: Iterable[str], progress: Progress) -> dict[Key, list[Trial]]:
    """Try the candidates of every row of the ops ``names`` on layers of these shapes.

    Args:
        shapes: a candidate's time is the sum over them.
        names: of ``TUNED``.
        progress: wraps the two loops that take long.
    """
    capability = torch.cuda.get_device_capability()
    table = configs.table(capability)
    groups = trials(table, names)
    with use_backend("triton"):
        _compile(table, groups, shapes, capability, progress)
        todo = [(key, *case) for key in groups for case in cases(key, shapes)]
        for key, name, shape in progress(todo, lambda case: f"timing {case[1]}, block_m {case[0][2]}", len(todo)):
            measure(table, groups[key], name, shape)
    return groups


def trials(table: dict[Key, configs.Tiles], names: Iterable[str]) -> dict[Key, list[Trial]]:
    """The candidates for each row that this table has of the ops, the current row first."""
    keys = [key for name in names for key in table if key[:2] == (name, _ELEMENT_SIZE)]
    return {key: [Trial(key, row, row == table[key]) for row in tile_rows.candidates(key, table[key])] for key in keys}


def cases(key: Key, shapes: Sequence[Shape]) -> list[tuple[str, Shape]]:
    """What runs on a row: benchmarks of ``ops.OPS``, each on layers whose plan has tiles of the row's block_m.

    Fewer tokens make the smaller tiles: as many as fill one tile of each expert.
    """
    op, _, block_m = key
    tall = block_m in (0, MAX_BLOCK_M)
    sized = [shape if tall else shape._replace(T=block_m * shape.E // shape.K) for shape in shapes]
    return [(name, shape) for shape in sized for name in TUNED[op]]


@contextlib.contextmanager
def in_table(table: dict[Key, configs.Tiles], trial: Trial) -> Iterator[None]:
    """The kernels launch with this row inside."""
    before = table[trial.key]
    table[trial.key] = trial.row
    try:
        yield
    finally:
        table[trial.key] = before


# Compile


def _compile(table, groups: dict[Key, list[Trial]], shapes: Sequence[Shape], capability, progress: Progress) -> None:
    """Make the machine code of all candidates at once, and drop those that have none or would not fit."""
    users: dict[compiling.Source, list[Trial]] = {}
    for key, group in groups.items():
        for name, shape in cases(key, shapes):
            op = ops.OPS[name]
            call = functools.partial(op.run, ops.kept(op, ops.inputs_of(shape, DEVICE)))
            for trial in group:
                with in_table(table, trial):
                    for source in compiling.recorded(call):
                        users.setdefault(source, []).append(trial)
    results = compiling.compiled(list(users), capability)
    limit = configs.shared_memory_limit(capability)
    for source, result in progress(results, lambda result: f"compiled {result[0].kernel}", len(users)):
        for trial in users[source]:
            trial.dropped = trial.dropped or why_dropped(result, trial.row, limit)


def why_dropped(result: Compiled | str, row: configs.Tiles, limit: int) -> str | None:
    """The reason why a compiled kernel can't run ``per_sm`` times on a multiprocessor, or why it wasn't compiled."""
    if isinstance(result, str):
        return result
    if row.per_sm * (result.shared + _RESERVED) <= limit + _RESERVED:
        return None
    return f"{row.per_sm} x {result.shared / 1024:.0f} KiB of shared memory, of {limit / 1024:.0f}"


# Check and time


def measure(table, group: Sequence[Trial], name: str, shape: Shape) -> None:
    """Add one benchmark on one shape to the candidates' times; one that is wrong is dropped."""
    op, inputs = ops.OPS[name], ops.inputs_of(shape, DEVICE)
    for trial in group:
        if trial.dropped is None:
            with in_table(table, trial):
                trial.dropped = _wrong(name, shape)
    left = [trial for trial in group if trial.dropped is None]
    for trial in left:
        trial.spans_us = []
    near = left
    for _ in range(_ROUNDS):
        for trial in near:
            with in_table(table, trial):
                trial.spans_us.append(ops.gpu_us(op, inputs))
        best = min((trial.spans_us[0] for trial in left), default=0.0)
        near = [trial for trial in left if trial.current or trial.spans_us[0] <= _NEAR * best]
    for trial in left:
        trial.ms += statistics.median(trial.spans_us) / 1e3
        trial.flops += ops.flops(op, shape)


def _wrong(name: str, shape: Shape) -> str | None:
    """What is wrong with the results of an op as it is now, or why it can't run."""
    try:
        ops.check(name, shape, DEVICE, "triton")
    except (Inaccurate, OutOfResources) as error:
        return str(error)
    return None


# Judge


def ranked(group: Sequence[Trial]) -> list[Trial]:
    """Those that were timed, best first."""
    return sorted((trial for trial in group if trial.dropped is None), key=lambda trial: trial.ms)


def current_of(group: Sequence[Trial]) -> Trial:
    return next(trial for trial in group if trial.current)


def better(group: Sequence[Trial]) -> Trial | None:
    """The best candidate if it is worth a change, or if the current row doesn't run at all."""
    best, current = next(iter(ranked(group)), None), current_of(group)
    if best is None or best.current:
        return None
    return best if current.dropped is not None or best.ms <= WORTH * current.ms else None


def note(best: Trial, current: Trial, gpu: str) -> str:
    before = "the row before did not run" if current.dropped is not None else f"was {current.tflops:.0f}"
    return f"{best.tflops:.0f} TFLOP/s on {gpu}, {before}"


def write(path: Path, groups: dict[Key, list[Trial]], capability: tuple[int, int], gpu: str) -> list[Key]:
    """Put the better rows into the file that holds the table of this GPU; the keys of those."""
    table = configs.table(capability)
    name = next(name for name, value in vars(configs).items() if value is table)
    source, written = path.read_text(), []
    for key, group in groups.items():
        if (best := better(group)) is not None:
            source = tile_rows.rewrite(source, name, key, best.row, note(best, current_of(group), gpu))
            written.append(key)
    if written:
        path.write_text(source)
    return written
