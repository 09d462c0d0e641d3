"""What a ``finetune`` run amounts to: the summary, the pictures and the table."""

import math
from pathlib import Path

REPORT_FIELDS = ("name", "kind", "class_name", "implementation", "backend", "accelerated", "reason")
_WINDOW = 20


def summarize(*, ours: dict, stock: dict | None, reloaded: dict, tolerance: float, on_gpu: bool, about: dict) -> dict:
    """The content of summary.json. A loss that isn't a finite number is written as null."""
    report = ours.pop("report")
    accelerated = sum(row["accelerated"] for row in report)
    runs = {"moe_kernels": _run(ours)}
    if stock is not None:
        runs["stock"] = _run(stock)
    difference = _relative(reloaded["held_out_loss"], ours["held_out_loss"])
    checks = {
        "loss_is_finite": {"passed": all(math.isfinite(x) for run in runs.values() for x in run["losses"])},
        "reload_with_stock_transformers": {
            "held_out_loss": reloaded["held_out_loss"],
            "relative_difference": difference,
            "tolerance": tolerance,
            "passed": difference <= tolerance,  # false for NaN too
        },
        # On a CPU, running stock code is no failure.
        "accelerated": {"layers": accelerated, "of": len(report), "passed": accelerated > 0 or not on_gpu},
    }
    summary = {**about, "checks": checks, "runs": runs}
    if stock is not None:
        summary["comparison"] = {
            # A single step is all warm-up: its speed compares nothing.
            "tokens_per_second_ratio": ours["tokens_per_second"] / stock["tokens_per_second"]
            if len(ours["losses"]) > 1
            else None,
            "peak_bytes_ratio": ours["peak_bytes"] / stock["peak_bytes"],
            "last_loss_difference_percent": 100 * (runs["moe_kernels"]["loss_last"] / runs["stock"]["loss_last"] - 1),
        }
    return _finite({**summary, "report": report, "expert_load": reloaded["expert_load"]})


def _run(result: dict) -> dict:
    losses = result["losses"]
    window = min(_WINDOW, max(1, len(losses) // 2))
    return {
        **result,
        "loss_window": window,
        "loss_first": sum(losses[:window]) / window,
        "loss_last": sum(losses[-window:]) / window,
    }


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(summary: dict, directory: Path) -> None:
    from moe_kernels.cli import charts

    runs = summary["runs"]
    stock = runs["stock"]["losses"] if "stock" in runs else None
    charts.loss(directory / "loss.png", runs["moe_kernels"]["losses"], stock, _title(summary))
    charts.expert_load(directory / "expert_load.png", summary["expert_load"])


def _title(summary: dict) -> str:
    arguments, device = summary["arguments"], summary["device"]
    batch = f"{arguments['batch_size']} x {arguments['seq_len']} tokens"
    model = summary["runs"]["moe_kernels"]["model_class"]
    return f"{model}, {arguments['max_steps']} steps of {batch}, {device['dtype']}, {device['name']}"


def show(summary: dict, directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    runs, checks = summary["runs"], summary["checks"]
    ours, stock, comparison = runs["moe_kernels"], runs.get("stock"), summary.get("comparison")
    console.print(_title(summary), style="bold", highlight=False)
    table = Table()
    table.add_column("")
    for header in ("moe_kernels", "stock", "compared") if stock else ("moe_kernels",):
        table.add_column(header, justify="right", no_wrap=True)

    def row(label: str, cell, compared: str = "") -> None:
        table.add_row(label, *(cell(run) for run in (ours, stock) if run), *([compared] if stock else []))

    n = ours["loss_window"]
    steps = "step" if n == 1 else f"{n} steps"
    row(f"loss, first {steps}", lambda run: _number(run["loss_first"]))
    last = comparison and comparison["last_loss_difference_percent"]
    row(f"loss, last {steps}", lambda run: _number(run["loss_last"]), "" if last is None else f"{last:+.3f} %")
    row("held-out loss", lambda run: _number(run["held_out_loss"]))
    ratio = comparison and comparison["tokens_per_second_ratio"]
    speed = f"{ratio:.2f}x" if ratio else ""
    row("tokens/s", lambda run: f"{run['tokens_per_second']:,.0f}", speed)
    peak = f"{comparison['peak_bytes_ratio']:.2f}x" if comparison else ""
    row(
        "peak memory, GPU" if summary["device"]["type"] == "cuda" else "peak memory, process",
        lambda run: _bytes(run["peak_bytes"]),
        peak,
    )
    console.print(table)

    found = checks["accelerated"]
    backends = sorted({line["backend"] for line in summary["report"] if line["accelerated"]})
    on = f" (backend {', '.join(backends)})" if backends else ""
    console.print(f"accelerated layers: {found['layers']} of {found['of']}{on}", _mark(found), highlight=False)
    reasons = sorted({line["reason"] for line in summary["report"] if not line["accelerated"] and line["reason"]})
    for reason in reasons:
        console.print(f"  not accelerated: {reason}", style="dim", highlight=False, markup=False)
    reload = checks["reload_with_stock_transformers"]
    console.print(
        f"reloaded with stock Transformers in a fresh process: held-out loss {_number(reload['held_out_loss'])}, "
        f"relative difference {_number(reload['relative_difference'], '.1e')} (allowed {reload['tolerance']:.0e})",
        _mark(reload),
        highlight=False,
    )
    if not checks["loss_is_finite"]["passed"]:
        console.print("the loss became infinite or NaN", _mark(checks["loss_is_finite"]))
    console.print(f"written to {directory}", highlight=False, markup=False, soft_wrap=True)


def _mark(check: dict) -> str:
    return "[green]ok[/]" if check["passed"] else "[bold red]FAILED[/]"


def _number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None else format(value, form)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
