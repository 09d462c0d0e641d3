"""Write the README's figures and draw its charts from the committed results.

    python -m benchmarks.readme

Everything between the two markers is made here; ``tests/test_readme.py`` fails when it is not what the results say.
The results are those of one GPU, ``benchmarks.GPU``. A figure that they lack is left out.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks import GPU, GPU_BEFORE, markdown, peers_table
from moe_kernels.bench import results
from moe_kernels.bench.results import ROOT
from moe_kernels.bench.shapes import SHAPES
from moe_kernels.cli import charts

README = ROOT / "README.md"
RESULTS, BEFORE = (ROOT / "benchmarks" / "results" / gpu for gpu in (GPU, GPU_BEFORE))
CHART, PEERS_CHART = "bench.png", "peers.png"
BEGIN, END = "<!-- measured: written by python -m benchmarks.readme -->", "<!-- /measured -->"
#: Implementations of the block that the README shows, with peers between them.
STOCK, OURS = "grouped_mm", "moe_kernels"


def measured(directory: Path, before: Path | None = None) -> str:
    """The figures of one GPU's results; ``before``: those of another that were shown before, to point at."""
    block, model, decode = (results.load(directory / name) for name in ("block.json", "model.json", "decode.json"))
    shown = _shown(block["rows"])
    parts: list[str] = []
    used = _Used(_machine(block, row) for rows in shown.values() for row in rows.values())
    if shown:
        parts += [
            _headline(shown, used),
            f"![time and memory of the block]({_relative(directory / CHART)})",
            *_block(shown, block, used),
        ]
    families = results.load(directory / "families.json")
    parts += peers_table.table(block, _relative(directory / PEERS_CHART), used.note)
    parts += _skewed(block, used) + _families(families, used) + _decode(decode, used) + _model(model, used)
    # It shows what the models learn, which takes no new run on every GPU.
    for place in filter(None, (directory, before)):
        if convergence := _read(place / "convergence.json"):
            where = "" if place == directory else f" on one {convergence['machine']['gpu']['name']}"
            parts += [
                _convergence(convergence, where, used),
                f"![loss of both runs]({_relative(place)}/convergence.png)",
            ]
            break
    return "\n\n".join(filter(None, [*parts, *used.line(), *([] if before is None else _older(before))]))


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _machine(results: dict, row: dict) -> dict:
    return results["machines"][row["machine"]]


class _Used:
    """The machines that the figures shown are of; the code that most rows of the table were measured on."""

    def __init__(self, machines: Iterable[dict]):
        self.machines = list(machines)
        hashes = Counter(machine["content_hash"] for machine in self.machines)
        self.content_hash = hashes.most_common(1)[0][0] if hashes else None

    def note(self, machines: Iterable[dict]) -> str:
        """What to say behind figures of these machines: nothing if they are of the table's code."""
        machines = list(machines)
        self.machines += machines
        if self.content_hash is None and machines:
            self.content_hash = machines[0]["content_hash"]
        others = dict.fromkeys(m["content_hash"] for m in machines if m["content_hash"] != self.content_hash)
        return f" (measured on other code: {', '.join(f'`{other}`' for other in others)})" if others else ""

    def line(self) -> list[str]:
        setups = dict.fromkeys(_setup(machine) for machine in self.machines)
        if not setups:
            return []
        return [
            markdown.filled(
                f"Measured on {', and on '.join(setups)}; content hash of the kernels `{self.content_hash}`. "
                "How, and what each figure means: [docs/benchmarks.md](docs/benchmarks.md)."
            )
        ]


def _older(directory: Path) -> list[str]:
    """Where the figures are that were shown before."""
    files = [found for path in sorted(directory.glob("*.json")) if "rows" in (found := _read(path))]
    used = _Used(_machine(found, row) for found in files for row in found["rows"].values())
    if not used.machines:
        return []
    gpu, path = used.machines[0]["gpu"]["name"], _relative(directory)
    return [markdown.filled(f"Older figures, of one {gpu} and content hash `{used.content_hash}`: [{path}]({path}).")]


def _setup(machine: dict) -> str:
    gpu, versions = machine["gpu"], machine["versions"]
    return (
        f"one {gpu['name']}, driver {gpu['driver']}, torch {versions['torch']} (CUDA {gpu['torch_cuda']}), "
        f"Triton {versions['triton']}, Transformers {versions['transformers']}"
    )


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


#: Columns of the table: what they show and how; one that no row has is left out.
_COLUMNS = {
    "forward_ms": ("fwd ms", ".2f"),
    "step_ms": ("fwd+bwd ms", ".2f"),
    "held_mib": ("held MiB", ".0f"),
    "peak_mib": ("peak MiB", ".0f"),
}


def _headline(shown: dict[str, dict[str, dict]], used: _Used) -> str:
    """Over how wide a range ours is better."""
    claims = {
        "step_ms": "{} times as fast as stock Transformers",
        "held_mib": "{} times less memory held for the backward",
        "peak_mib": "{} times less at the peak",
    }
    said = []
    for metric, claim in claims.items():
        ratios = [r for rows in shown.values() if (r := _ratio(rows[STOCK], rows[OURS], metric)) is not None]
        if ratios:
            low, high = (f"{ratio:.1f}" for ratio in (min(ratios), max(ratios)))
            said.append(claim.format(low if low == high else f"{low} to {high}"))
    gpu = used.machines[0]["gpu"]["name"]
    return markdown.filled(f"**One MoE block, forward and backward, on one {gpu}: {', '.join(said)}.**") if said else ""


def _ratio(stock: dict, ours: dict, metric: str) -> float | None:
    return stock[metric] / ours[metric] if markdown.has(stock, metric) and markdown.has(ours, metric) else None


def _block(shown: dict[str, dict[str, dict]], block: dict, used: _Used) -> list[str]:
    metrics = [m for m in _COLUMNS if any(markdown.has(row, m) for rows in shown.values() for row in rows.values())]
    headings = ["layer", "implementation", *(_COLUMNS[metric][0] for metric in metrics)]
    lines = [markdown.line(headings), "|---|---|" + "---:|" * len(metrics)]
    for name, rows in shown.items():
        sizes = " · ".join(str(getattr(SHAPES[name], letter)) for letter in "TDIEK")
        note = used.note(_machine(block, row) for row in rows.values())
        first = [name + note, sizes]
        for implementation, row in rows.items():
            label = {STOCK: "stock", OURS: f"**{OURS}**"}.get(implementation, implementation)
            cells = (markdown.figure(row, metric, _COLUMNS[metric][1]) for metric in metrics)
            lines.append(markdown.line([first.pop(0) if first else "", label, *cells]))
        ratios = [_ratio(rows[STOCK], rows[OURS], metric) for metric in metrics]
        lines.append(markdown.line(["", "stock / ours", *("" if r is None else f"**{r:.1f}x**" for r in ratios)]))
    return [
        markdown.filled(
            "Qwen3's block at these layer sizes (tokens · model width · expert width · experts · experts of a token), "
            "with the stock router and stock or our experts, bf16, uniform random routing. Stock is Transformers' "
            "default, `grouped_mm`. *Held* is what stays between forward and backward, *peak* the most a step takes, "
            "both beyond parameters, gradients, input and output."
        ),
        "\n".join(lines),
    ]


def _skewed(block: dict, used: _Used) -> list[str]:
    """What skewed routing costs our experts."""
    said, rows = [], []
    for shape in SHAPES:
        found = {kind: block["rows"].get(f"experts/{shape}/{kind}/{OURS}", {}) for kind in ("zipf", "one-hot")}
        found = {kind: row for kind, row in found.items() if "step_over_uniform" in row}
        if found:
            figures = ", ".join(f"{kind} {row['step_over_uniform']:.2f}" for kind, row in found.items())
            said.append(f"{shape} {figures}")
            rows += found.values()
    if not said:
        return []
    note = used.note(_machine(block, row) for row in rows)
    return [
        markdown.filled(
            "Our experts with skewed routing, forward and backward, as a multiple of their time on uniform routing: "
            f"{'; '.join(said)}{note}."
        )
    ]


#: Columns of the families: whose row, what it shows, how, and its heading.
_FAMILY_COLUMNS = (
    (STOCK, "step_ms", ".1f", "stock, ms"),
    (OURS, "step_ms", ".1f", "ours, ms"),
    (OURS, "times_stock", ".1f", "stock / ours"),
    (OURS, "step_over_bound", ".2f", "ours / bound"),
    (STOCK, "peak_mib", ".0f", "stock, peak MiB"),
    (OURS, "peak_mib", ".0f", "ours, peak MiB"),
)


def _families(families: dict, used: _Used) -> list[str]:
    """One layer of each family at real size."""
    rows = families["rows"]
    models = [name.split("/")[1] for name in rows if name.startswith("block/") and name.endswith(f"/{OURS}")]
    if not models:
        return []
    found = {(model, who): rows.get(f"block/{model}/uniform/{who}") for model in models for who in (STOCK, OURS)}
    note = used.note(_machine(families, row) for row in found.values() if row is not None)
    text = (
        "The whole block of one layer at the model's real size, router and shared expert included, 8192 tokens, bf16, "
        "forward and backward. The bound is the time of the bare products, by cuBLAS, and of the sums over experts; "
        f"peak is what a step takes beyond parameters, gradients, input and output{note}."
    )
    lines = [
        markdown.line(["model", *(column[-1] for column in _FAMILY_COLUMNS)]),
        "|---|" + "---:|" * len(_FAMILY_COLUMNS),
    ]
    for model in models:
        cells = [model]
        for who, metric, how, _ in _FAMILY_COLUMNS:
            row = found[model, who] or {}
            cells.append(markdown.figure(row, metric, how))
        lines.append(markdown.line(cells))
    return [markdown.filled(text), "\n".join(lines)]


def _decode(decode: dict, used: _Used) -> list[str]:
    """Forward of few tokens beside the better of stock's two implementations for it."""
    figures = []
    for name, row in decode["rows"].items():
        _, shape, tokens, implementation = name.split("/")
        if implementation == OURS and "over_best_stock" in row:
            best = row["forward_ms"] / row["over_best_stock"]
            text = f"T = {tokens[1:]} {row['forward_ms']:.2f} ms ({best:.2f})"
            figures.append((int(tokens[1:]), text, shape, _machine(decode, row)))
    if not figures:
        return []
    figures.sort(key=lambda figure: figure[0])
    listed = ", ".join(figure[1] for figure in figures)
    return [
        markdown.filled(
            f"Few tokens, forward of the {figures[0][2]} experts, launches included, in brackets the better of "
            f"stock's `grouped_mm` and `batched_mm`: {listed}{used.note(figure[3] for figure in figures)}."
        )
    ]


#: The whole model: what the README calls the rows.
_MODEL = {"liger+grouped_mm": "stock experts", "liger+moe_kernels": f"**{OURS}**"}
_MODEL_COLUMNS = {"step_ms": ("ms/step", ".1f"), "tokens_per_s": ("tokens/s", ",.0f"), "peak_gib": ("peak GiB", ".1f")}


def _model(model: dict, used: _Used) -> list[str]:
    """A training step of a whole model, and its first step in a fresh process."""
    prefix = "model/qwen3-30b-4L/"
    rows = {label: row for name, label in _MODEL.items() if (row := model["rows"].get(prefix + name))}
    if not rows:
        return []
    text = (
        "A training step (forward, loss, backward) of Qwen3-30B-A3B cut to 4 layers, 4 x 4096 tokens, bf16, with "
        "Liger's RMSNorm, rotary embedding and fused linear cross-entropy. Peak is all that is allocated, parameters "
        f"and gradients included{used.note(_machine(model, row) for row in rows.values())}."
    )
    lines = [markdown.line(["experts", *(heading for heading, _ in _MODEL_COLUMNS.values())]), "|---|---:|---:|---:|"]
    for label, row in rows.items():
        cells = (markdown.figure(row, metric, how) for metric, (_, how) in _MODEL_COLUMNS.items())
        lines.append(markdown.line([label, *cells]))
    parts = [markdown.filled(text), "\n".join(lines)]
    first = model["rows"].get(f"{prefix}first_step", {})
    if markdown.has(first, "first_step_s"):
        compiled = first.get("compilations_after")
        later = (
            ""
            if compiled is None
            else "; after that and one batch for each tile size, 20 batches of changing sizes compile "
            f"{compiled or 'none'} of our kernels"
        )
        note = used.note([_machine(model, first)])
        parts.append(
            markdown.filled(
                f"Its first step with empty compiler caches takes {first['first_step_s']:.0f} s{later}{note}."
            )
        )
    return parts


def _convergence(found: dict, where: str, used: _Used) -> str:
    ours, stock = found["runs"]["moe_kernels"], found["runs"]["stock"]
    difference = found["comparison"]["last_loss_difference_percent"]
    layers, steps = found["sizes"]["layers"], len(ours["losses"])
    return markdown.filled(
        f"A {layers}-layer Qwen3-30B-shaped checkpoint, {steps} steps in bf16{where} through "
        "`moe-kernels finetune --compare`, the same weights and data: the mean loss of the last 20 steps is "
        f"{ours['loss_last']:.4f} with our experts and {stock['loss_last']:.4f} with stock ({difference:+.2f} %), at "
        f"{ours['tokens_per_second']:,.0f} and {stock['tokens_per_second']:,.0f} tokens/s, optimizer included"
        f"{used.note([found['machine']])}."
    )


def written(readme: str) -> str:
    """The README with its figures renewed."""
    before, rest = readme.split(BEGIN)
    figures = measured(RESULTS, None if BEFORE == RESULTS else BEFORE)
    return f"{before}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    block = results.load(RESULTS / "block.json")
    charts.layers(RESULTS / CHART, block)
    peers_table.chart(RESULTS / PEERS_CHART, block)
    README.write_text(written(README.read_text()))


if __name__ == "__main__":
    main()
