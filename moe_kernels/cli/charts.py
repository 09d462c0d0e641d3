"""The pictures of a run: loss curves and how evenly the experts are used."""

from pathlib import Path

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


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
