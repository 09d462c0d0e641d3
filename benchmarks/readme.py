"""Write the README's figures and draw its chart from the committed results: ``python -m benchmarks.readme``.

Everything between the two markers is made here; ``tests/test_readme.py`` fails when it is not what the results say.
A figure that the results lack is left out.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from moe_kernels.bench import results
from moe_kernels.bench.results import ROOT
from moe_kernels.bench.shapes import SHAPES
from moe_kernels.cli import charts

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
CHART = "bench.png"
BEGIN, END = "<!-- measured: written by python -m benchmarks.readme -->", "<!-- /measured -->"
#: Implementations of the block that the README shows, with peers between them.
STOCK, OURS = "grouped_mm", "moe_kernels"


def measured(directory: Path) -> str:
    block, decode = (results.load(directory / name) for name in ("block.json", "decode.json"))
    convergence = directory / "convergence.json"
    shown = _shown(block["rows"])
    parts = [*_machines(block, [row for rows in shown.values() for row in rows.values()])]
    if shown:
        parts += [_block(shown), f"![time and memory of the block]({_relative(directory / CHART)})"]
    parts += _experts(block["rows"]) + _decode(decode["rows"])
    if convergence.exists():
        parts += [
            _convergence(json.loads(convergence.read_text())),
            f"![loss of both runs]({_relative(directory)}/convergence.png)",
        ]
    return "\n\n".join(parts)


def _relative(path: Path) -> str:
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def _shown(rows: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """By shape and implementation: stock, peers, ours; the shapes that have both stock and ours."""
    shown = {}
    for shape in SHAPES:
        prefix = f"block/{shape}/uniform/"
        found = {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
        if STOCK in found and OURS in found:
            others = found.keys() - {STOCK, "eager", "batched_mm"}
            peers = sorted(name for name in others if not name.startswith(OURS))
            shown[shape] = {name: found[name] for name in (STOCK, *peers, OURS)}
    return shown


def _machines(block: dict, rows: Iterable[dict]) -> list[str]:
    """What the rows were measured on; more than one line where they are of several runs."""
    return [_machine(block["machines"][key]) for key in dict.fromkeys(row["machine"] for row in rows)]


def _machine(machine: dict) -> str:
    gpu, versions = machine["gpu"], machine["versions"]
    return (
        f"One {gpu['name']}, driver {gpu['driver']}, torch {versions['torch']} (CUDA {gpu['torch_cuda']}), Triton "
        f"{versions['triton']}, Transformers {versions['transformers']}; content hash of the kernels "
        f"`{machine['content_hash']}`. In the same run a copy moves {machine['copy_tb_per_s']:.2f} TB/s and "
        f"an 8192³ product makes {machine['matmul_tflops']:.0f} TFLOP/s."
    )


#: Columns of the table: what they show and how; one that no row has is left out.
_COLUMNS = {
    "forward_ms": ("fwd ms", ".2f"),
    "step_ms": ("fwd+bwd ms", ".2f"),
    "step_accumulate_ms": ("fwd+bwd adding ms", ".2f"),
    "step_tflops": ("TFLOP/s", ".0f"),
    "held_mib": ("held MiB", ".0f"),
    "peak_mib": ("peak MiB", ".0f"),
}
#: Where the line below a shape says by how much ours is better.
_COMPARED = {"step_ms": "**{:.1f}x**", "step_accumulate_ms": "**{:.1f}x**", "held_mib": "**{:.1f}x less**"}


def _block(shown: dict[str, dict[str, dict]]) -> str:
    metrics = [m for m in _COLUMNS if any(m in row for rows in shown.values() for row in rows.values())]
    headings = ["layer", "T · D · I · E · K", "", *(_COLUMNS[metric][0] for metric in metrics)]
    lines = [_line(headings), "|" + "---|" * len(headings)]
    for name, rows in shown.items():
        first = [name, " · ".join(str(getattr(SHAPES[name], letter)) for letter in "TDIEK")]
        for implementation, row in rows.items():
            label = {STOCK: "stock", OURS: f"**{OURS}**"}.get(implementation, implementation)
            lines.append(_line([*first, label, *(_cell(row, metric) for metric in metrics)]))
            first = ["", ""]
        stock, ours = rows[STOCK], rows[OURS]
        both = _COMPARED.keys() & stock.keys() & ours.keys()
        lines.append(
            _line(["", "", "", *(_COMPARED[m].format(stock[m] / ours[m]) if m in both else "" for m in metrics)])
        )
    return (
        "The whole MoE block of Qwen3 (stock router, our or stock experts), bf16, uniform random routing. Stock is "
        "Transformers' default, `grouped_mm`. *Adding* is a step whose gradients are added to those of an earlier one. "
        "*Held* is what stays between forward and backward, *peak* the most a step takes beyond parameters, gradients, "
        "input and output. How it is measured: [docs/benchmarks.md](docs/benchmarks.md).\n\n" + "\n".join(lines)
    )


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _cell(row: dict, metric: str) -> str:
    return format(row[metric], _COLUMNS[metric][1]) if metric in row else "-"


def _experts(rows: dict[str, dict]) -> list[str]:
    """How far our experts are from the bound, and what skewed routing costs."""
    uniform = {shape: rows.get(f"experts/{shape}/uniform/{OURS}", {}) for shape in SHAPES}
    over = {shape: row["step_over_bound"] for shape, row in uniform.items() if "step_over_bound" in row}
    if not over:
        return []
    text = (
        "Our experts alone, with the routing given, forward and backward, as a multiple of the time of their bare "
        f"products and sums: {_list(over)}."
    )
    skewed = {
        kind: row["step_over_uniform"]
        for kind in ("zipf", "one-hot")
        for shape in SHAPES
        if "step_over_uniform" in (row := rows.get(f"experts/{shape}/{kind}/{OURS}", {}))
    }
    if skewed:
        text += f" As a multiple of their time on uniform routing: {_list(skewed)}."
    return [text]


def _list(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def _decode(rows: dict[str, dict]) -> list[str]:
    """Forward of few tokens beside the better of stock's two implementations for it."""
    figures = []
    for name, row in rows.items():
        _, shape, tokens, implementation = name.split("/")
        if implementation == OURS and "over_best_stock" in row:
            best = row["forward_ms"] / row["over_best_stock"]
            figures.append((int(tokens[1:]), f"T = {tokens[1:]} {row['forward_ms']:.2f} ms ({best:.2f})", shape))
    if not figures:
        return []
    listed = ", ".join(text for _, text, _ in sorted(figures))
    return [
        f"Few tokens, forward of the {figures[0][2]} experts, launches included, in brackets the better of stock's "
        f"`grouped_mm` and `batched_mm`: {listed}."
    ]


def _convergence(found: dict) -> str:
    ours, stock = found["runs"]["moe_kernels"], found["runs"]["stock"]
    difference = found["comparison"]["last_loss_difference_percent"]
    layers, steps = found["sizes"]["layers"], len(ours["losses"])
    return (
        f"A {layers}-layer Qwen3-30B-shaped checkpoint, {steps} steps in bf16 through "
        "`moe-kernels finetune --compare`, the same weights and data: the mean loss of the last 20 steps is "
        f"{ours['loss_last']:.4f} with our experts and {stock['loss_last']:.4f} with stock ({difference:+.2f} %), at "
        f"{ours['tokens_per_second']:,.0f} and {stock['tokens_per_second']:,.0f} tokens/s, optimizer included."
    )


def written(readme: str) -> str:
    """The README with its figures renewed."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{measured(RESULTS)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    charts.layers(RESULTS / CHART, results.load(RESULTS / "block.json"))
    README.write_text(written(README.read_text()))


if __name__ == "__main__":
    main()
