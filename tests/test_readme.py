"""The README says what the committed results say, and what they lack it leaves out."""

import json
import re
import shutil

import pytest

from benchmarks import readme
from moe_kernels.bench import results

MACHINE = {
    "gpu": {"name": "a GPU", "driver": "1", "torch_cuda": "13.0"},
    "versions": {"torch": "2", "triton": "3", "transformers": "5"},
    "content_hash": "0123456789abcdef",
    "copy_tb_per_s": 3.0,
    "matmul_tflops": 750.0,
}
ROW = {"forward_ms": 2.7, "step_ms": 8.0, "step_accumulate_ms": 9.0, "step_tflops": 464.0}
ROW |= {"held_mib": 395.0, "peak_mib": 1227.0}
OURS, STOCK = "block/qwen3-30b/uniform/moe_kernels", "block/qwen3-30b/uniform/grouped_mm"


def test_figures_are_those_of_the_results():
    text = readme.README.read_text()
    assert readme.written(text) == text, "run: python -m benchmarks.readme"


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[.*\]\((.*)\)", readme.README.read_text())
    for name in (readme.CHART, readme.PEERS_CHART):
        assert any(picture.endswith(name) for picture in pictures)
    for picture in pictures:
        assert (readme.ROOT / picture).read_bytes().startswith(b"\x89PNG")


def lines(directory, rows, file="block.json", **machine) -> list[str]:
    results.save(directory / file, rows, MACHINE | machine)
    return readme.measured(directory).splitlines()


def prose(directory) -> str:
    """The text as if it were not wrapped."""
    return " ".join(readme.measured(directory).split())


def test_without_results_nothing_is_said(tmp_path):
    assert readme.measured(tmp_path) == ""


def test_rows_of_whole_runs(tmp_path):
    stock = {name: 2 * value for name, value in ROW.items()}
    found = lines(tmp_path, {OURS: ROW, STOCK: stock, "block/qwen3-30b/uniform/liger": ROW})
    table = [line for line in found if line.startswith("|")]
    assert table == [
        "| layer | implementation | fwd ms | fwd+bwd ms | held MiB | peak MiB |",
        "|---|---|---:|---:|---:|---:|",
        "| qwen3-30b | stock | 5.40 | 16.00 | 790 | 2454 |",
        "| 16384 · 2048 · 768 · 128 · 8 | liger | 2.70 | 8.00 | 395 | 1227 |",
        "| | **moe_kernels** | 2.70 | 8.00 | 395 | 1227 |",
        "| | stock / ours | **2.0x** | **2.0x** | **2.0x** | **2.0x** |",
    ]


def test_the_headline_comes_first_with_ranges_over_the_shapes(tmp_path):
    rows = {OURS: ROW, STOCK: {**ROW, "step_ms": 20.0, "held_mib": 1580.0, "peak_mib": 3681.0}}
    lines(tmp_path, rows)
    start = prose(tmp_path).partition("**.")[0]
    assert start.startswith("**One MoE block, forward and backward, on one a GPU: 2.5 times as fast as stock")
    assert "4.0 times less memory held for the backward, 3.0 times less at the peak.**" in start
    other = {name.replace("qwen3-30b", "olmoe-7b"): row for name, row in {OURS: ROW, STOCK: ROW}.items()}
    lines(tmp_path, other)
    assert "1.0 to 2.5 times as fast" in prose(tmp_path) and "1.0 to 4.0 times less" in prose(tmp_path)


def test_a_figure_that_no_row_has_has_no_column(tmp_path):
    old = {name: value for name, value in ROW.items() if not name.startswith("step_")}
    found = lines(tmp_path, {OURS: old, STOCK: old})
    assert "| 16384 · 2048 · 768 · 128 · 8 | **moe_kernels** | 2.70 | 395 | 1227 |" in found


@pytest.mark.parametrize("step", [{}, {"step_ms": "not finished"}])
def test_a_figure_that_one_row_lacks_is_a_dash(tmp_path, step):
    stock = {name: value for name, value in ROW.items() if name != "step_ms"} | step
    found = lines(tmp_path, {OURS: ROW, STOCK: stock})
    assert "| qwen3-30b | stock | 2.70 | - | 395 | 1227 |" in found
    assert "| | stock / ours | **1.0x** | | **1.0x** | **1.0x** |" in found


def test_the_last_line_says_the_machine_once(tmp_path):
    lines(tmp_path, {STOCK: ROW, OURS: ROW})
    lines(tmp_path, {name.replace("qwen3-30b", "olmoe-7b"): ROW for name in (STOCK, OURS)}, copy_tb_per_s=2.9)
    last = " ".join(readme.measured(tmp_path).rpartition("\n\n")[2].split())
    assert last.startswith("Measured on one a GPU, driver 1, torch 2 (CUDA 13.0), Triton 3, Transformers 5; content")
    assert "`0123456789abcdef`" in last and "measured on other code" not in prose(tmp_path)


OTHER = "fedcba9876543210"
CONVERGENCE = readme.BEFORE / "convergence.json"
NOTE = f"(measured on other code: `{OTHER}`)"


def test_every_part_that_is_of_other_code_says_so(tmp_path):
    lines(tmp_path, {STOCK: ROW, OURS: ROW})
    lines(tmp_path, EXPERTS, content_hash=OTHER)
    lines(tmp_path, FEW, "decode.json", content_hash=OTHER)
    lines(tmp_path, MODEL, "model.json", content_hash=OTHER)
    (tmp_path / "convergence.json").write_text(CONVERGENCE.read_text())
    text = prose(tmp_path)
    assert f"forward and backward {NOTE}. TFLOP/s" in text and f"qwen3-30b zipf 1.05 {NOTE}." in text
    assert f"T = 256 0.10 ms (0.20) {NOTE}." in text
    assert f"gradients included {NOTE}." in text and f"none of our kernels {NOTE}." in text
    present = json.loads(CONVERGENCE.read_text())["machine"]["content_hash"]
    assert f"optimizer included (measured on other code: `{present}`)." in text


def test_a_shape_of_other_code_says_so_in_the_table(tmp_path):
    lines(tmp_path, {STOCK: ROW, OURS: ROW})
    other = {name.replace("qwen3-30b", "olmoe-7b"): ROW for name in (STOCK, OURS)}
    more = {name.replace("qwen3-30b", "sonic-7b-n256"): ROW for name in (STOCK, OURS)}
    lines(tmp_path, more)
    found = lines(tmp_path, other, content_hash=OTHER)
    assert f"| olmoe-7b {NOTE} | stock | 2.70 | 8.00 | 395 | 1227 |" in found


def convergence_of(gpu: str) -> dict:
    found = json.loads(CONVERGENCE.read_text())
    return found | {"machine": MACHINE | {"gpu": MACHINE["gpu"] | {"name": gpu}}}


def test_figures_of_the_gpu_before_are_pointed_at(tmp_path):
    old, new = tmp_path / "old-gpu", tmp_path / "new-gpu"
    lines(old, {STOCK: ROW, OURS: ROW}, gpu=MACHINE["gpu"] | {"name": "old GPU"}, content_hash=OTHER)
    lines(old, FEW, "decode.json", gpu=MACHINE["gpu"] | {"name": "old GPU"})
    lines(new, {STOCK: ROW, OURS: ROW}, gpu=MACHINE["gpu"] | {"name": "new GPU"})
    alone = readme.measured(new)
    assert "on one new GPU" in alone and f"({new.as_posix()}/{readme.CHART})" in alone and "old" not in alone
    assert readme.measured(new, tmp_path / "none") == alone
    line = readme.measured(new, old).removeprefix(alone).split()
    name = old.as_posix()
    (old / "convergence.json").write_text(json.dumps(convergence_of("old GPU")))
    assert "steps in bf16 on one old GPU through" in " ".join(readme.measured(new, old).split())
    (new / "convergence.json").write_text(json.dumps(convergence_of("new GPU")))
    assert "steps in bf16 through" in " ".join(readme.measured(new, old).split())
    assert line == f"Older figures, of one old GPU and content hash `0123456789abcdef`: [{name}]({name}).".split()


@pytest.mark.parametrize("before, said", [("same", False), ("other", True)])
def test_only_another_gpus_figures_are_pointed_at(tmp_path, monkeypatch, before, said):
    for name in ("same", "other"):
        lines(tmp_path / name, {STOCK: ROW, OURS: ROW})
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "same")
    monkeypatch.setattr(readme, "BEFORE", tmp_path / before)
    assert ("Older figures" in readme.written(f"{readme.BEGIN}{readme.END}")) == said


EXPERTS = {
    "experts/qwen3-30b/uniform/moe_kernels": {"step_tflops": 522.0, "step_over_bound": 1.234},
    "experts/qwen3-30b/zipf/moe_kernels": {"step_over_uniform": 1.05},
}
FEW = {f"decode/qwen3-30b/T{tokens}/moe_kernels": {"forward_ms": 0.1, "over_best_stock": 0.5} for tokens in (8, 256, 1)}
STEP = {"step_ms": 150.04, "tokens_per_s": 109200.4, "peak_gib": 13.21}
MODEL = {
    "model/qwen3-30b-4L/liger+moe_kernels": STEP,
    "model/qwen3-30b-4L/liger+grouped_mm": {"step_ms": 195.0, "tokens_per_s": 84000.0},
    "model/qwen3-30b-4L/grouped_mm": {"step_ms": 236.0, "tokens_per_s": 69000.0, "peak_gib": 50.0},
    "model/qwen3-30b-4L/first_step": {"first_step_s": 41.7, "compilations_after": 0},
}


def test_experts_and_decode_are_said_where_measured(tmp_path):
    lines(tmp_path, {OURS: ROW, STOCK: ROW, **EXPERTS})
    lines(tmp_path, FEW, "decode.json")
    text = prose(tmp_path)
    assert "| 1.23 | - | 522 |" in text and "on uniform routing: qwen3-30b zipf 1.05." in text
    assert "T = 1 0.10 ms (0.20), T = 8 0.10 ms (0.20), T = 256 0.10 ms (0.20)." in text


def test_a_peer_that_was_stopped_after_its_forward(tmp_path):
    peer = {"forward_ms": 3.0, "forward_over_moe_kernels": 1.1, "reason": "first call not finished in 240 s"}
    found = lines(tmp_path, {OURS: ROW, STOCK: ROW, "block/qwen3-30b/uniform/sonicmoe": peer})
    assert "| 16384 · 2048 · 768 · 128 · 8 | sonicmoe | 3.00 | - | - | - |" in found


def test_the_whole_model(tmp_path):
    found = lines(tmp_path, MODEL, "model.json")
    start = found.index("| experts | ms/step | tokens/s | peak GiB |")
    assert found[start + 2 : start + 5] == [
        "| stock experts | 195.0 | 84,000 | - |",
        "| **moe_kernels** | 150.0 | 109,200 | 13.2 |",
        "",
    ]
    assert "takes 42 s; after that" in prose(tmp_path) and "20 batches of changing sizes compile none" in prose(
        tmp_path
    )


def test_a_model_file_without_those_rows_says_nothing(tmp_path):
    lines(tmp_path, {"model/tiny/moe_kernels": STEP}, "model.json")
    assert readme.measured(tmp_path) == ""


def test_lines_of_prose_are_short():
    text = readme.README.read_text()
    assert [line for line in text.splitlines() if len(line) > 140 and not line.startswith("|")] == []


def test_main_renews_text_and_picture(tmp_path, monkeypatch):
    shutil.copytree(readme.RESULTS, tmp_path / "results")
    for chart in (readme.CHART, readme.PEERS_CHART):
        (tmp_path / "results" / chart).unlink()
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    pytest.importorskip("matplotlib")
    readme.main([])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "fwd ms" in text
    assert all((tmp_path / "results" / chart).exists() for chart in (readme.CHART, readme.PEERS_CHART))


def test_help_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(readme, "written", lambda text: pytest.fail("wrote"))
    with pytest.raises(SystemExit) as stop:
        readme.main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
