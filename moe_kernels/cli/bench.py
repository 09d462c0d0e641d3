"""``moe-kernels bench``: how fast and how lean MoE layers are on this GPU, beside stock Transformers."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moe_kernels.bench import machine, results
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES
from moe_kernels.cli import RunError, UsageError, first_line, require

CHART = "bench.png"


def run(args: argparse.Namespace) -> int:
    if args.tune:
        from moe_kernels.cli import tune

        return tune.run(args)
    if args.op or args.write:
        raise UsageError(f"{'--op' if args.op else '--write'} goes with --tune only")
    require("bench", "rich", "matplotlib", "transformers")
    directory = _directory(args)
    if machine.gpu() is None:
        raise UsageError("bench measures kernels and needs an NVIDIA GPU that torch can use; there is none")

    from moe_kernels.bench import block
    from moe_kernels.bench.session import Session

    try:
        session = Session()
    except ValueError as error:
        raise UsageError(error) from None
    shapes = [SHAPES[name] for name in dict.fromkeys(args.shape or DEFAULT_SHAPES)]
    routings = dict.fromkeys(args.routing)
    line = session.machine  # measured now: a GPU that has crashed could not tell its ceilings
    notes = [f"{case.name}: {reason}" for shape in shapes for case, reason in block.left_out(shape)]
    try:
        failures, reasons = _measure(session, [case for shape in shapes for case in block.cases(shape, routings)])
        notes += reasons
        if args.peers:
            notes += _measure_peers(session, shapes)
    finally:
        written = _write(session, directory, "--save" if args.save else "--output-dir")
    show(session.rows.get(block.FILE, {}), line, failures, notes, written)
    return 1 if failures else 0


def _directory(args: argparse.Namespace) -> Path:
    """Where the results go, found unusable before anything is measured."""
    if args.save:
        if not (results.ROOT / "pyproject.toml").is_file():
            raise UsageError("--save: moe_kernels does not run from a checkout; name a directory with --output-dir")
        option, wanted = "--save", results.results_dir()
    else:
        option, wanted = "--output-dir", args.output_dir
    try:
        directory = wanted.expanduser().absolute()
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not existing.is_dir():
            raise UsageError(f"{option}: {existing} is not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"{option}: {existing} is not writable")
        earlier = results.load(directory / "block.json")
        if not (isinstance(earlier, dict) and {"machines", "rows"} <= earlier.keys()):
            raise UsageError(f"{option}: {directory / 'block.json'} holds no results of a benchmark")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a file that isn't JSON
        raise UsageError(f"{option}: can't use {wanted} ({first_line(error)})") from None
    return directory


def _measure(session, cases: list) -> tuple[list[str], list[str]]:
    """Check and measure the cases: what is wrong with ours, and what kept stock from running."""
    import torch

    from moe_kernels.bench import block
    from moe_kernels.bench.layer import OURS, Inaccurate

    failures, notes = [], []
    for case in progress(cases, lambda case: case.name, len(cases)):
        try:
            block.run(session, case)
        except (Inaccurate, torch.OutOfMemoryError) as error:
            text = f"{case.name}: {first_line(error)}"
            (failures if case.implementation in OURS else notes).append(text)
    return failures, notes


def _measure_peers(session, shapes: list) -> list[str]:
    """Measure third-party kernels, each in a process of its own; what kept some from running."""
    from moe_kernels.bench import block, peers

    pairs = [(shape, name) for name, reason in peers.available().items() if reason is None for shape in shapes]
    notes = [f"{name}: {reason}" for name, reason in peers.available().items() if reason is not None]
    said = "{0[1]} on {0[0].name}, which may take minutes".format
    for shape, name in progress(pairs, said, len(pairs)):
        if (reason := block.run_peer(session, shape, name)) is not None:
            notes.append(f"{name} on {shape.name}: {reason}")
    return notes


def progress(things: Iterable, describe: Callable[..., str], total: int) -> Iterator:
    """The things, with a bar that names the one at hand."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        for thing in things:
            bar.update(task, description=describe(thing))
            yield thing
            bar.advance(task)
        bar.update(task, description="")


def _write(session, directory: Path, option: str) -> list[Path]:
    from moe_kernels.bench import block
    from moe_kernels.cli import charts

    try:
        written = session.save(directory)
        if written and charts.layers(directory / CHART, results.load(directory / block.FILE)):
            written.append(directory / CHART)
    except OSError as error:
        raise RunError(f"{option}: can't write in {directory} ({error.strerror})") from None
    return written


def show(rows: dict[str, dict], machine: dict, failures: list[str], notes: list[str], written: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, console.width))  # a log should not fold the table
    rates = f"copy {machine['copy_tb_per_s']:.2f} TB/s, 8192³ product {machine['matmul_tflops']:.0f} TFLOP/s"
    table = Table(title=f"MoE layers on one {machine['gpu']['name']}, bf16; {rates}", title_justify="left")
    for heading in ("shape", "what"):
        table.add_column(heading)
    for heading in ("fwd ms", "bwd ms", "fwd+bwd ms", "TFLOP/s", "x bound", "held MiB", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    measured = [name.split("/") for name in rows if name.startswith(("block/", "experts/"))]
    for shape in dict.fromkeys(parts[1] for parts in measured):
        first = shape
        for parts in measured:
            if parts[1] == shape:
                table.add_row(first, _what(*parts), *figures(rows["/".join(parts)]))
                first = ""
        table.add_section()
    console.print(table)
    for line in failures:
        console.print(Text.assemble(("FAILED", "bold red"), " ", line))
    for line in notes:
        console.print(line, style="dim", highlight=False, markup=False)
    for path in written:
        console.print(f"written to {path}", highlight=False, markup=False, soft_wrap=True)


def _what(what: str, shape: str, routing: str, implementation: str) -> str:
    return f"{what}, {implementation}" + ("" if routing == "uniform" else f", {routing}")


def figures(row: dict) -> list[str]:
    """The cells of a row; empty where it has no such figure."""
    forms = {
        "forward_ms": ".2f",
        "backward_ms": ".2f",
        "step_ms": ".2f",
        "step_tflops": ".0f",
        "step_over_bound": ".2f",
        "held_mib": ".0f",
        "peak_mib": ".0f",
    }
    return [format(row[key], form) if key in row else "" for key, form in forms.items()]
