"""The pictures: loss curves and how evenly the experts are used; time, memory and throughput of MoE layers."""

import itertools
from pathlib import Path

from moe_kernels.bench.shapes import SHAPES

_OURS, _STOCK, _GRID = "#0b6e4f", "#f4a259", "#d9d9d9"


def loss(path: Path, ours: list[float], stock: list[float] | None, title: str) -> None:
    """Loss over steps; with a stock run, both curves and their difference in percent below."""
    plt = _pyplot()
    if stock is None:
        figure, upper = plt.subplots(figsize=(8, 4.5))
        axes = [upper]
    else:
        figure, axes = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(3, 1))
        upper, lower = axes
    steps = range(1, len(ours) + 1)
    ours, stock = _gaps(ours), stock and _gaps(stock)
    if stock is not None:
        # Wide and pale below narrow and dark: both stay visible where they coincide.
        upper.plot(
            steps, stock, color=_STOCK, linewidth=5, alpha=0.75, solid_capstyle="round", label="stock Transformers"
        )
        difference = [100 * (a - b) / b for a, b in zip(ours, stock, strict=True)]
        lower.plot(steps, difference, color=_OURS, linewidth=1.2)
        lower.axhline(0, color="#555555", linewidth=0.8)
        widest = max([0.1, *(1.2 * abs(x) for x in difference if x == x)])
        lower.set_ylim(-widest, widest)
        lower.set_ylabel("difference, %")
    upper.plot(steps, ours, color=_OURS, linewidth=1.6, label="moe_kernels")
    upper.set_ylabel("training loss")
    upper.set_title(title, loc="left", fontsize=11)
    upper.legend(frameon=False, reverse=True)
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(color=_GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    figure.align_ylabels(axes)
    _save(figure, path)


def _gaps(losses: list[float | None]) -> list[float]:
    return [float("nan") if x is None else x for x in losses]


def expert_load(path: Path, load: dict[str, list[float]]) -> None:
    """Heat map, layer by expert, of the tokens each expert gets, as a multiple of the even share."""
    plt = _pyplot()
    rows = [[share * len(shares) for share in shares] for shares in load.values()]
    experts = max(len(row) for row in rows)
    rows = [row + [float("nan")] * (experts - len(row)) for row in rows]  # layers may differ in their experts
    # One crowded expert must not wash out the rest: the scale ends at four even shares.
    most = max(x for row in rows for x in row if x == x)
    end = min(4.0, max(2.0, most))
    figure, axis = plt.subplots(figsize=(10, min(14, 1.7 + 0.42 * len(rows))))
    image = axis.imshow(rows, aspect="auto", cmap="YlGn", vmin=0, vmax=end, interpolation="nearest")
    if experts <= 20:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                color = "white" if value > 0.6 * end else "#333333"
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
    every = max(1, -(-len(rows) // 32))
    axis.set_yticks(range(0, len(rows), every), [_layer(name) for name in load][::every])
    axis.set_xticks(range(0, experts, max(1, -(-experts // 16))))
    axis.tick_params(length=0)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.set_title("Tokens routed to each expert on held-out text (1 = even share)", loc="left", fontsize=11)
    axis.set_xticks([x - 0.5 for x in range(1, experts)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2 if experts <= 64 else 0.5)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, pad=0.015, fraction=0.03, extend="max" if most > end else "neither")
    bar.ax.yaxis.set_major_formatter("{x:g}x")
    bar.ax.axhline(1, color="#333333", linewidth=1)
    bar.outline.set_visible(False)
    _save(figure, path)


def _layer(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), name)


#: Bars of a shape, from its top; peers, which nobody can list here, come between stock and ours.
_STOCK_BARS = {"eager": "#c9c1b6", "batched_mm": "#e3cfae", "grouped_mm": _STOCK}
_SLOW = ("eager", "batched_mm")
_PEER_COLORS = ("#5b8db8", "#8d7bb5", "#7a8b99")


def layers(path: Path, results: dict) -> bool:
    """Step time and memory of whole blocks, by shape and implementation, from a file of results; False without any."""
    found = {}
    for name, row in results["rows"].items():
        what, shape, *rest = name.split("/")
        # Variants of ours are left out, and a peer that was stopped before its first step was done.
        if what == "block" and rest[0] == "uniform" and not rest[1].startswith("moe_kernels_") and "reason" not in row:
            found.setdefault(shape, {})[rest[1]] = row
    found = {shape: rows for shape, rows in found.items() if "moe_kernels" in rows}
    if not found:
        return False
    shapes = [shape for shape in SHAPES if shape in found]
    every = {name for rows in found.values() for name in rows}
    peers = sorted(every - {*_STOCK_BARS, "moe_kernels"})
    colors = _STOCK_BARS | dict(zip(peers, itertools.cycle(_PEER_COLORS))) | {"moe_kernels": _OURS}
    colors = {name: color for name, color in colors.items() if name in every}
    places, ticks, top = {}, {}, 0.0
    for shape in shapes:
        names = [name for name in colors if name in found[shape]]
        places |= {(shape, name): top + index for index, name in enumerate(names)}
        ticks[shape] = top + (len(names) - 1) / 2
        top += len(names) + 0.9
    # A result file may hold only the steps that add to gradients.
    step = "step_ms" if all("step_ms" in found[s][n] for s, n in places) else "step_accumulate_ms"

    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.36 * top), sharey=True, width_ratios=(5, 4), layout="constrained"
    )
    times = {place: found[place[0]][place[1]].get(step) for place in places}
    _step_bars(left, places, {place: ms for place, ms in times.items() if ms is not None}, colors)
    _bound_lines(left, places, {shape: results["rows"].get(f"bound/{shape}") for shape in shapes})
    _memory_bars(right, places, {place: found[place[0]][place[1]] for place in places}, colors)
    adding = "" if step == "step_ms" else ", adding to gradients"
    left.set_title(f"forward + backward of the MoE block, ms{adding}", loc="left", fontsize=11)
    right.set_title("memory of the step, MiB: held (dark) and peak", loc="left", fontsize=11)
    left.set_yticks(list(ticks.values()), list(ticks))
    left.invert_yaxis()
    for axis in (left, right):
        axis.grid(axis="x", color=_GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    names = [f"{name} (stock)" if name in _STOCK_BARS else name for name in colors]
    if left.lines:
        handles.append(left.lines[0])
        names.append("bound t_b of the experts: bare products and sums")
    figure.legend(handles, names, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    machines = {results["machines"][row["machine"]]["gpu"]["name"] for rows in found.values() for row in rows.values()}
    figure.suptitle(f"{', '.join(sorted(machines))}, bf16, uniform routing", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


#: Bars of a layer in turn: what they are of, and how they look.
_THROUGHPUT = {
    "stock": ("experts, stock Transformers", {"color": _STOCK}),
    "ours": ("experts, moe_kernels", {"color": _OURS}),
    "our_block": ("block, moe_kernels, in turn with SonicMoE", {"color": _OURS, "alpha": 0.55}),
    "peer": ("block, SonicMoE", {"color": _PEER_COLORS[0]}),
    "published": (
        "block, SonicMoE, published on an {gpu}",
        {"facecolor": "white", "edgecolor": _PEER_COLORS[0], "hatch": "//////", "linewidth": 0.8},
    ),
}


def throughput(
    path: Path, bars: dict[str, dict[str, float]], bounds: dict[str, float], title: str, published_gpu: str
) -> None:
    """TFLOP/s of forward and backward: a group of bars for each layer, and the bound above it.

    Args:
        path: of the picture.
        bars: by layer, what was measured or published of it, by name: stock, ours, our_block, peer, published.
        bounds: TFLOP/s at the bound, of the layers where it is known.
        title: what all was measured on.
        published_gpu: what the published figures are of.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(13, 5), layout="constrained")
    handles, ticks, left = {}, {}, 0.0
    for layer, found in bars.items():
        names = [name for name in _THROUGHPUT if name in found]
        for x, name in enumerate(names):
            label, look = _THROUGHPUT[name]
            drawn = axis.bar(left + x, found[name], width=0.9, **look)
            handles.setdefault(name, (drawn, label.format(gpu=published_gpu)))
            text = axis.text(left + x + 0.03, found[name] - 8, f"{found[name]:.0f}", ha="center", va="top")
            text.set(rotation=90, fontsize=7.5, color="#333333" if name in ("stock", "published") else "white")
            if name == "published":  # or the hatching would run through it
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        width = max(1, len(names))
        ticks[layer] = left + (width - 1) / 2
        if layer in bounds:
            (drawn,) = axis.plot([left - 0.6, left + width - 0.4], [bounds[layer]] * 2, color="#222222", linewidth=1.6)
            handles.setdefault("bound", (drawn, "bound t_b of the experts: bare products and sums"))
        left += width + 1.1
    axis.set_xticks(list(ticks.values()), ["\n".join(layer.rsplit("-", 1)) for layer in ticks], fontsize=7.5)
    axis.set_xlim(-1.1, left - 1.0)
    axis.set_title(f"forward + backward of every layer, TFLOP/s; {title}", loc="left", fontsize=11)
    axis.grid(axis="y", color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="both", length=0)
    shown = [handles[name] for name in (*_THROUGHPUT, "bound") if name in handles]
    figure.legend(*zip(*shown), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _step_bars(axis, places: dict, times: dict, colors: dict) -> None:
    # Two of stock's may be ten times slower than all others: their bars are cut and say how long they are.
    longest = max([ms for (_, name), ms in times.items() if name not in _SLOW] or times.values())
    for place, ms in times.items():
        axis.barh(places[place], min(ms, longest), height=0.86, color=colors[place[1]])
        text = f" {ms:.1f}" if ms <= longest else f" {ms:.0f} \u2192"
        weight = "bold" if place[1] == "moe_kernels" else "normal"
        axis.text(min(ms, longest), places[place], text, va="center", fontsize=9, fontweight=weight)
    axis.set_xlim(0, 1.13 * longest)


def _bound_lines(axis, places: dict, bounds: dict) -> None:
    for shape, bound in bounds.items():
        if bound is not None:
            rows = [y for (of, _), y in places.items() if of == shape]
            axis.plot([bound["step_ms"]] * 2, [min(rows) - 0.55, max(rows) + 0.55], color="#222222", linewidth=1.4)


def _memory_bars(axis, places: dict, rows: dict, colors: dict) -> None:
    most = max(row["peak_mib"] for row in rows.values())
    for (shape, name), row in rows.items():
        y = places[shape, name]
        axis.barh(y, row["peak_mib"], height=0.86, color=colors[name], alpha=0.45)
        axis.barh(y, row["held_mib"], height=0.86, color=colors[name])
        weight = "bold" if name == "moe_kernels" else "normal"
        text = f" {row['held_mib']:.0f} / {row['peak_mib']:.0f}"
        axis.text(row["peak_mib"], y, text, va="center", fontsize=9, fontweight=weight)
    axis.set_xlim(0, 1.25 * most)
    axis.locator_params(axis="x", nbins=6)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
