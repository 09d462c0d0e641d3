"""Every layer beside stock, SonicMoE and the bound t_b: the README's table and chart of them.

Ours, stock and t_b are of the experts alone, SonicMoE's figures of a whole block with its router. So a time of it that
was measured here is also given as a multiple of our block's, both run in turn. What SonicMoE published
(``published.toml``) is of another GPU, and drawn where nothing was measured here. What nobody measured is a dash, and
has no bar.
"""

import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import markdown
from moe_kernels.bench.shapes import ALL_SHAPES, SHAPES, Shape
from moe_kernels.cli import charts

PUBLISHED = Path(__file__).with_name("published.toml")
STOCK, OURS, PEER = "grouped_mm", "moe_kernels", "sonicmoe"
#: What SonicMoE's wheels ask for: it is installed here without its dependencies.
DECLARED_TORCH = "torch <= 2.9.1"


class Figure(NamedTuple):
    """TFLOP/s that somebody published."""

    forward: float
    backward: float
    roughly: bool  # one of them, or both

    @property
    def step(self) -> float:
        """Of both: a backward has twice the operations of a forward."""
        return 3 / (1 / self.forward + 2 / self.backward)


class Published(NamedTuple):
    source: str
    gpu: str
    what: str
    within: float
    within_roughly: float
    figures: dict[str, Figure]  # by layer


def read(path: Path = PUBLISHED) -> Published:
    """What SonicMoE published."""
    found = tomllib.loads(path.read_text())[PEER]
    layers = found.pop("layers")
    if unknown := layers.keys() - SHAPES.keys():
        raise ValueError(f"{path.name}: layers must be shapes of moe_kernels/bench/shapes.py, got {', '.join(unknown)}")
    figures = {name: Figure(row["forward"], row["backward"], "roughly" in row) for name, row in layers.items()}
    return Published(**found, figures=figures)


class Beside(NamedTuple):
    """A layer: the rows of block.json, each empty if there is none, and what was published."""

    shape: Shape
    bound: dict
    ours: dict
    stock: dict
    peer: dict
    published: Figure | None

    @property
    def rows(self) -> list[dict]:
        return [row for row in (self.bound, self.ours, self.stock, self.peer) if row]


def beside(rows: dict[str, dict], published: Published) -> list[Beside]:
    """All layers, in the order of their table, if ours was measured on any."""
    layers = [
        Beside(
            SHAPES[name],
            rows.get(f"bound/{name}", {}),
            rows.get(f"experts/{name}/uniform/{OURS}", {}),
            rows.get(f"experts/{name}/uniform/{STOCK}", {}),
            rows.get(f"block/{name}/uniform/{PEER}", {}),
            published.figures.get(name),
        )
        for name in ALL_SHAPES
    ]
    return layers if any(markdown.has(layer.ours, "step_tflops") for layer in layers) else []


# The table


def table(results: dict, picture: str, note: Callable[[Iterable[dict]], str]) -> list[str]:
    """The chart, what the figures are, and the table, one line a layer.

    Args:
        results: the contents of block.json.
        picture: where the chart is, from the README.
        note: what to say behind figures of these machines.
    """
    published = read()
    layers = beside(results["rows"], published)
    if not layers:
        return []
    machines = results["machines"]
    noted = note(machines[row["machine"]] for layer in layers for row in layer.rows)
    text = (
        "Our experts alone, with the routing given, uniform, beside stock's and beside t_b, the time of their bare "
        f"products and sums; forward and backward{noted}. TFLOP/s count useful products only. t_b and its ratio are "
        "of a loop in which both run in turn, at one clock; ms of ours and of stock are of loops of their own."
    )
    headings = ("t_b, ms", "ours, ms", "ours / t_b", "stock, ms", "ours, TFLOP/s")
    headings += ("SonicMoE here, TFLOP/s", "its block's time / ours", "SonicMoE published, TFLOP/s")
    lines = [markdown.line(["layer", "T · D · I · E · K", *headings]), "|---|---|" + "---:|" * len(headings)]
    return [
        f"![TFLOP/s of every layer]({picture})",
        markdown.filled(text),
        "\n".join(lines + [markdown.line(_cells(layer, published)) for layer in layers]),
        markdown.filled(" ".join(_sonicmoe(layers, machines, published) + _reasons(layers))),
    ]


def _cells(layer: Beside, published: Published) -> list[str]:
    figure = layer.published
    return [
        layer.shape.name,
        " · ".join(str(getattr(layer.shape, letter)) for letter in "TDIEK"),
        markdown.figure(layer.bound, "step_ms", ".2f"),
        markdown.figure(layer.ours, "step_ms", ".2f"),
        markdown.figure(layer.ours, "step_over_bound", ".2f"),
        markdown.figure(layer.stock, "step_ms", ".2f"),
        markdown.figure(layer.ours, "step_tflops", ".0f"),
        markdown.figure(layer.peer, "step_tflops", ".0f"),
        markdown.figure(layer.peer, "step_over_moe_kernels", ".2f"),
        markdown.DASH if figure is None else f"*{'~' * figure.roughly}{figure.step:.0f} ({published.gpu})*",
    ]


def _sonicmoe(layers: list[Beside], machines: dict[str, dict], published: Published) -> list[str]:
    """What its figures are of."""
    said = ["SonicMoE's figures are of a whole block, router included: don't compare them with our experts'."]
    measured = [layer.peer for layer in layers if markdown.has(layer.peer, "step_tflops")]
    versions = {machines[row["machine"]]["versions"]["torch"] for row in measured}
    if versions:
        said.append(
            "*Here* is Qwen3's block with the stock router, and how its time stands to that of our block, both run in "
            f"turn (above 1 ours is faster). Its wheels declare {DECLARED_TORCH} and ran with torch "
            f"{', '.join(sorted(versions))}, installed without their dependencies."
        )
    said.append(
        f"*Published* is of {published.source}, on an {published.gpu} of theirs, which is another GPU: it shows how "
        "they do from layer to layer, not who is faster. Read off a chart, forward and backward each within "
        f"{published.within:g} TFLOP/s, behind ~ within {published.within_roughly:g}."
    )
    return said


def _reasons(layers: list[Beside]) -> list[str]:
    """Why stock or SonicMoE have a dash where they were tried."""
    return [
        f"{who} on {layer.shape.name}: {row['reason'].partition(';')[0].rstrip('.')}."
        for layer in layers
        for who, row in (("Stock", layer.stock), ("SonicMoE", layer.peer))
        if "reason" in row
    ]


# The chart


def chart(path: Path, results: dict) -> bool:
    """Draw the table's TFLOP/s; False where there is nothing to draw."""
    published = read()
    layers = beside(results["rows"], published)
    if not layers:
        return False
    bars = {layer.shape.name: _bars(layer) for layer in layers}
    bounds = {
        layer.shape.name: 3 * layer.shape.forward_flops / layer.bound["step_ms"] / 1e9
        for layer in layers
        if markdown.has(layer.bound, "step_ms")
    }
    gpus = {results["machines"][row["machine"]]["gpu"]["name"] for layer in layers for row in layer.rows}
    charts.throughput(path, bars, bounds, f"{', '.join(sorted(gpus))}, bf16, uniform routing", published.gpu)
    return True


def _bars(layer: Beside) -> dict[str, float]:
    """TFLOP/s by what it is of."""
    rows = {"stock": layer.stock, "ours": layer.ours, "peer": layer.peer}
    bars = {name: row["step_tflops"] for name, row in rows.items() if markdown.has(row, "step_tflops")}
    if "peer" in bars:
        if markdown.has(layer.peer, "step_over_moe_kernels"):
            bars["our_block"] = bars["peer"] * layer.peer["step_over_moe_kernels"]
    elif layer.published is not None:
        bars["published"] = layer.published.step
    return bars
