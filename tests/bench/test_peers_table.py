"""The table of peers and its chart: what was measured, what was published, and a dash for the rest."""

import pytest

from benchmarks import peers_table
from moe_kernels.bench.shapes import ALL_SHAPES, SHAPES
from moe_kernels.cli import charts

PUBLISHED = peers_table.read()
SONIC = "sonic-7b-n256"
MACHINES = {"key": {"gpu": {"name": "a GPU"}, "versions": {"torch": "2.11.0"}}}
ROWS = {
    "bound/qwen3-30b": {"step_ms": 6.0},
    "experts/qwen3-30b/uniform/moe_kernels": {"step_ms": 7.2, "step_tflops": 522.0, "step_over_bound": 1.2},
    "experts/qwen3-30b/uniform/grouped_mm": {"step_ms": 17.0, "step_tflops": 217.0, "step_over_bound": 2.8},
    "block/qwen3-30b/uniform/sonicmoe": {"step_ms": 7.4, "step_tflops": 500.0, "step_over_moe_kernels": 0.9},
}


def file_of(rows: dict[str, dict]) -> dict:
    return {"machines": MACHINES, "rows": {name: {**row, "machine": "key"} for name, row in rows.items()}}


def table(rows: dict[str, dict], note=lambda machines: "") -> tuple[dict[str, list[str]], str]:
    """The figures by layer, behind its sizes, and the text around them."""
    picture, before, lines, after = peers_table.table(file_of(rows), "peers.png", note)
    assert picture == "![TFLOP/s of every layer](peers.png)"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()[2:]]
    return {name: rest for name, sizes, *rest in cells}, " ".join(f"{before} {after}".split())


def bars(rows: dict[str, dict]) -> dict[str, dict[str, float]]:
    layers = peers_table.beside(file_of(rows)["rows"], PUBLISHED)
    return {layer.shape.name: peers_table._bars(layer) for layer in layers}


# What was published


def test_published_figures_are_of_the_twelve_layers():
    assert PUBLISHED.figures.keys() == {name for name in SHAPES if name.startswith("sonic-")}
    assert "2512.14080" in PUBLISHED.source and PUBLISHED.gpu == "H100" and PUBLISHED.within < PUBLISHED.within_roughly
    for figure in PUBLISHED.figures.values():
        assert 300 < figure.forward < 600 and 300 < figure.backward < 600


def test_a_step_takes_the_time_of_both():
    figure = peers_table.Figure(forward=300, backward=600, roughly=False)
    assert figure.step == pytest.approx(450)  # a third of the operations in half of the time
    assert figure._replace(backward=300).step == pytest.approx(300)


def test_a_layer_that_is_not_measured_here_is_refused(tmp_path):
    text = peers_table.PUBLISHED.read_text().replace('"sonic-7b-n256"', '"sonic-9b"')
    (tmp_path / "published.toml").write_text(text)
    with pytest.raises(ValueError, match=r"published.toml: layers must be shapes of .*, got sonic-9b"):
        peers_table.read(tmp_path / "published.toml")


# The table


def test_every_layer_has_a_line_and_what_is_missing_is_a_dash():
    found, _ = table(ROWS)
    assert list(found) == list(ALL_SHAPES)
    assert found["qwen3-30b"] == ["6.00", "7.20", "1.20", "17.00", "522", "500", "0.90", "-"]
    assert all(set(found[name]) == {"-"} for name in ALL_SHAPES[1:] if not name.startswith("sonic-"))
    for name, figure in PUBLISHED.figures.items():
        *measured, published = found[name]
        assert set(measured) == {"-"}
        assert published == f"*{'~' if figure.roughly else ''}{figure.step:.0f} (H100)*"


def test_without_a_layer_of_ours_there_is_nothing(tmp_path):
    rows = {name: row for name, row in ROWS.items() if "experts" not in name}
    assert peers_table.table(file_of(rows), "peers.png", lambda machines: "") == []
    assert not peers_table.chart(tmp_path / "peers.png", file_of(rows))
    assert not (tmp_path / "peers.png").exists()


def test_the_text_says_what_the_figures_are_of():
    asked = []
    _, text = table(ROWS, lambda machines: asked.extend(machines) or " (measured on other code)")
    assert len(asked) == len(ROWS) and "forward and backward (measured on other code). TFLOP/s" in text
    assert "Its wheels declare torch <= 2.9.1 and ran with torch 2.11.0," in text
    assert "arXiv 2512.14080, figure 14, on an H100 of theirs, which is another GPU" in text
    assert "each within 6 TFLOP/s, behind ~ within 10." in text


def test_without_sonicmoe_nothing_is_said_about_a_run_of_it():
    stopped = {"block/qwen3-30b/uniform/sonicmoe": {"forward_ms": 2.5, "reason": "first call not finished in 240 s"}}
    _, text = table(ROWS | stopped)
    assert "*Here*" not in text and "wheels" not in text and "*Published*" in text


def test_reasons_stand_below():
    rows = {
        "experts/mixtral/uniform/grouped_mm": {"reason": "out of memory: CUDA out of memory."},
        f"block/{SONIC}/uniform/sonicmoe": {
            "forward_ms": 1.3,
            "reason": "first call not finished in 240 s; stderr: no | wonder",
        },
    }
    found, text = table(ROWS | rows)
    assert found["mixtral"][3] == "-" and found[SONIC][5:7] == ["-", "-"]
    assert "Stock on mixtral: out of memory: CUDA out of memory. SonicMoE on sonic-7b-n256: first call not" in text
    assert text.endswith("finished in 240 s.")


# The chart


def test_bars_are_what_was_measured_or_else_published():
    measured = {f"block/{SONIC}/uniform/sonicmoe": {"step_tflops": 400.0, "step_over_moe_kernels": 1.25}}
    drawn = bars(ROWS | measured)
    assert drawn["qwen3-30b"] == {"stock": 217, "ours": 522, "peer": 500, "our_block": 450}
    assert drawn["mixtral"] == {}
    assert drawn[SONIC] == {"peer": 400, "our_block": 500}, "what was published is of another GPU"
    assert drawn["sonic-7b-n512"] == {"published": PUBLISHED.figures["sonic-7b-n512"].step}
    assert "our_block" not in bars({**ROWS, f"block/{SONIC}/uniform/sonicmoe": {"step_tflops": 400.0}})[SONIC]


def test_a_peer_that_was_stopped_has_no_bar():
    stopped = {"forward_ms": 1.3, "forward_tflops": 380.0, "reason": "first call not finished in 240 s"}
    assert bars(ROWS | {f"block/{SONIC}/uniform/sonicmoe": stopped})[SONIC].keys() == {"published"}


def test_chart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    throughput = charts.throughput
    monkeypatch.setattr(charts, "throughput", lambda *args: drawn.append(args) or throughput(*args))
    assert peers_table.chart(tmp_path / "peers.png", file_of(ROWS))
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    ((_, of_layers, bounds, title, published_gpu),) = drawn
    assert of_layers == bars(ROWS) and title == "a GPU, bf16, uniform routing" and published_gpu == "H100"
    assert bounds == {"qwen3-30b": pytest.approx(3 * SHAPES["qwen3-30b"].forward_flops / 6e9)}
