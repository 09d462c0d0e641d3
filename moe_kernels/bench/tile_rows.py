"""Rows of the Triton tile table as an offline tuner sees them: what to try instead of one, and its line in configs.py.

torch is not needed for either: the command line reads ``TUNED`` before it knows that it has work to do.
"""

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_kernels.backends.triton.configs import Tiles

Key = tuple[str, int, int]  # op, bytes per element, block_m

#: Ops of the table, with the benchmarks of ``ops.OPS`` that run on their rows.
TUNED = {
    "gate_up": ("gate_up",),
    "grouped_gemm": ("grouped_gemm_down", "grouped_gemm_dx"),
    "d_activation": ("d_activation",),
    "grouped_wgrad_lhs": ("grouped_wgrad_down",),
    "grouped_wgrad_rhs": ("grouped_wgrad_gate_up",),
}
#: Tiles of an op whose sums a program holds at the same time: gate and up.
_ACCUMULATORS = {"gate_up": 2}
#: Of 255 registers a thread, how many the sums may take.
_MOST_SUMS = 128
_LIMITS = {"block_n": (16, 256), "block_k": (16, 128), "num_stages": (2, 7), "group_m": (1, 64)}
_LIMITS_OF_BLOCK_M = (64, 256)  # where the row has one
_SCHEDULES = ({"num_warps": 8, "per_sm": 1}, {"num_warps": 4, "per_sm": 1}, {"num_warps": 4, "per_sm": 2})
_LINE_LENGTH = 120
_NOTE = "# tuned:"


# What to try


def candidates(key: Key, row: "Tiles") -> "list[Tiles]":
    """The row itself, then its neighbours: a tile side halved or doubled, in each schedule, with a stage more or less.

    A smaller tile leaves room for more stages, a larger one or a second program for fewer, so only that direction is
    tried. Whether the shared memory suffices is left to the compiler, which knows what it reuses.
    """
    tiles = [(row, (-1, 0, 1))]
    for side, fewer in (("block_n", (-1, 0)), ("block_k", (-2, -1)), ("block_m", (-1, 0))):
        size = getattr(row, side)
        more = [-change for change in fewer]
        tiles += [(row._replace(**{side: size // 2}), more), (row._replace(**{side: size * 2}), fewer)]
    found = [
        tile._replace(**schedule, num_stages=row.num_stages + change + row.per_sm - schedule["per_sm"])
        for tile, changes in tiles
        for schedule in _SCHEDULES
        for change in changes
    ]
    found += [row._replace(group_m=size) for size in (row.group_m // 2, row.group_m * 2)]
    return [row, *(each for each in dict.fromkeys(found) if each != row and _sensible(key, each))]


def _sensible(key: Key, row: "Tiles") -> bool:
    op, _, block_m = key
    limits = _LIMITS if block_m else _LIMITS | {"block_m": _LIMITS_OF_BLOCK_M}
    sums = _ACCUMULATORS.get(op, 1) * (block_m or row.block_m) * row.block_n // (32 * row.num_warps)
    return sums <= _MOST_SUMS and all(low <= getattr(row, name) <= high for name, (low, high) in limits.items())


# Lines of configs.py


def text(row: "Tiles") -> str:
    """``Tiles(256, 64, 8, 3, per_sm=2)``: what has no default by place, the rest by name where it differs."""
    defaults = row._field_defaults
    values = [
        f"{name}={value!r}" if name in defaults else repr(value)
        for name, value in row._asdict().items()
        if name not in defaults or value != defaults[name]
    ]
    return f"{type(row).__name__}({', '.join(values)})"


def lines(key: Key, row: "Tiles", note: str) -> list[str]:
    """The row as configs.py has it, ``note`` behind it, or above it where the line would get too long."""
    key_text = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    line, comment = f"    ({key_text}): {text(row)},", f"{_NOTE} {note}"
    together = f"{line}  {comment}"
    return [together] if len(together) <= _LINE_LENGTH else [f"    {comment}", line]


def rewrite(source: str, table: str, key: Key, row: "Tiles", note: str) -> str:
    """The text of configs.py with one row of one table replaced, and nothing else touched.

    Args:
        source: the text of the file.
        table: name of the dict that holds the row, one entry a line.
        key: of the row.
        row: what it becomes.
        note: what the comment says, which replaces that of an earlier tuning.
    """
    start, end = _place(source, table, key)
    found = source.splitlines()
    if found[start - 1].lstrip().startswith(_NOTE):
        start -= 1
    return "\n".join([*found[:start], *lines(key, row, note), *found[end:], ""])


def _place(source: str, table: str, key: Key) -> tuple[int, int]:
    """First line of the row, counted from 0, and the line behind it."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == table:
            for entries in (node for node in ast.walk(statement.value) if isinstance(node, ast.Dict)):
                for name, value in zip(entries.keys, entries.values, strict=True):
                    if name is not None and ast.literal_eval(name) == key:
                        return name.lineno - 1, value.end_lineno
    raise ValueError(f"rewrite: key must be of a row that {table} has, got {key!r}")
