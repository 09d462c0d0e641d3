"""``moe-kernels bench --tune``: better rows for the tile table of the Triton kernels, found on this GPU."""

import argparse
from pathlib import Path

from moe_kernels.bench import machine, results, tile_rows
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES
from moe_kernels.cli import RunError, UsageError, require
from moe_kernels.cli.bench import progress


def run(args: argparse.Namespace) -> int:
    for option in ("peers", "save"):
        if getattr(args, option):
            raise UsageError(f"--{option} measures rows of results and does not go with --tune")
    require("bench --tune", "rich", "transformers", "triton")
    if args.write and not (results.ROOT / "pyproject.toml").is_file():
        raise UsageError("--write: moe_kernels does not run from a checkout")
    if (gpu := machine.gpu()) is None:
        raise UsageError("--tune times kernels and needs an NVIDIA GPU that torch can use; there is none")

    import torch

    from moe_kernels.backends.triton import configs
    from moe_kernels.bench import tune

    shapes = [SHAPES[name] for name in dict.fromkeys(args.shape or DEFAULT_SHAPES[:1])]
    groups = tune.tune(shapes, dict.fromkeys(args.op or tile_rows.TUNED), progress)
    show(groups, gpu["name"], [shape.name for shape in shapes])
    if args.write:
        path = Path(configs.__file__)
        try:
            written = tune.write(path, groups, torch.cuda.get_device_capability(), gpu["name"])
        except OSError as error:
            raise RunError(f"--write: can't write {path} ({error.strerror})") from None
        print(f"{len(written)} rows written to {path}")
    return 1 if any(tune.current_of(group).dropped for group in groups.values()) else 0


def show(groups: dict, gpu: str, shapes: list[str]) -> None:
    """All candidates, best first, then what was dropped and why, then the rows that are worth a change."""
    from rich.console import Console
    from rich.table import Table

    from moe_kernels.bench import tune

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, console.width))  # a log should not fold the table
    table = Table(title=f"Tiles of the Triton kernels on one {gpu}, bf16, {', '.join(shapes)}", title_justify="left")
    table.add_column("op")
    table.add_column("block_m", justify="right")
    table.add_column("candidate", no_wrap=True)
    for heading in ("ms", "TFLOP/s", "x current"):
        table.add_column(heading, justify="right")
    for (op, _, block_m), group in groups.items():
        first, current = (op, str(block_m or "")), tune.current_of(group)
        for trial in tune.ranked(group):
            relative = "" if current.dropped is not None else f"{trial.ms / current.ms:.3f}"
            figures = (f"{trial.ms:.4f}", f"{trial.tflops:.0f}", relative)
            table.add_row(*first, tile_rows.text(trial.row), *figures, style="bold" if trial.current else None)
            first = ("", "")
        table.add_section()
    console.print(table)
    for key, group in groups.items():
        for trial in group:
            if trial.dropped is not None:
                said = "current row" if trial.current else "dropped"
                text = f"{said}: {key[0]} {key[2] or ''} {tile_rows.text(trial.row)}: {trial.dropped}"
                console.print(text, style="bold red" if trial.current else "dim", highlight=False, markup=False)
    better = {key: best for key, group in groups.items() if (best := tune.better(group)) is not None}
    least = f"{1 - tune.WORTH:.0%}"
    console.print(f"{len(better)} of {len(groups)} rows would be better by {least} or more", highlight=False)
    for key, best in better.items():
        for line in tile_rows.lines(key, best.row, tune.note(best, tune.current_of(groups[key]), gpu)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
