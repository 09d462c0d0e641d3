"""The README says what the committed results say, and what they lack it leaves out."""

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
    for picture in (readme.CHART, "convergence.png"):
        assert (readme.RESULTS / picture).read_bytes().startswith(b"\x89PNG")


def lines(directory, rows, file="block.json") -> list[str]:
    results.save(directory / file, rows, MACHINE)
    return readme.measured(directory).splitlines()


def test_without_results_nothing_is_said(tmp_path):
    assert readme.measured(tmp_path) == ""


def test_rows_of_whole_runs(tmp_path):
    stock = {name: 2 * value for name, value in ROW.items()}
    found = lines(tmp_path, {OURS: ROW, STOCK: stock, "block/qwen3-30b/uniform/liger": ROW})
    assert "| | | **moe_kernels** | 2.70 | 8.00 | 9.00 | 464 | 395 | 1227 |" in found
    assert "| | | liger | 2.70 | 8.00 | 9.00 | 464 | 395 | 1227 |" in found
    assert "| | | | | **2.0x** | **2.0x** | | **2.0x less** | |" in found


def test_a_figure_that_no_row_has_has_no_column(tmp_path):
    old = {name: value for name, value in ROW.items() if not name.startswith("step_") or "accumulate" in name}
    found = lines(tmp_path, {OURS: old, STOCK: old})
    assert "| | | **moe_kernels** | 2.70 | 9.00 | 395 | 1227 |" in found
    assert not [line for line in found if "TFLOP/s |" in line]


def test_a_figure_that_one_row_lacks_is_a_dash(tmp_path):
    found = lines(tmp_path, {OURS: ROW, STOCK: {name: value for name, value in ROW.items() if name != "step_ms"}})
    assert [line for line in found if "| stock | 2.70 | - | 9.00 |" in line]
    assert "| | | | | | **1.0x** | | **1.0x less** | |" in found


def test_rows_of_two_runs_have_two_machine_lines(tmp_path):
    lines(tmp_path, {STOCK: ROW})
    results.save(tmp_path / "block.json", {OURS: ROW}, {**MACHINE, "content_hash": "fedcba9876543210"})
    text = readme.measured(tmp_path)
    assert "`0123456789abcdef`" in text and "`fedcba9876543210`" in text


def test_experts_and_decode_are_said_where_measured(tmp_path):
    experts = {
        "experts/qwen3-30b/uniform/moe_kernels": {"step_over_bound": 1.234},
        "experts/qwen3-30b/zipf/moe_kernels": {"step_over_uniform": 1.05},
    }
    lines(tmp_path, {OURS: ROW, STOCK: ROW, **experts})
    few = {
        f"decode/qwen3-30b/T{tokens}/moe_kernels": {"forward_ms": 0.1, "over_best_stock": 0.5} for tokens in (8, 256, 1)
    }
    text = "\n".join(lines(tmp_path, few, "decode.json"))
    assert "qwen3-30b 1.23." in text and "zipf 1.05." in text
    assert "T = 1 0.10 ms (0.20), T = 8 0.10 ms (0.20), T = 256 0.10 ms (0.20)." in text


def test_main_renews_text_and_picture(tmp_path, monkeypatch):
    shutil.copytree(readme.RESULTS, tmp_path / "results")
    (tmp_path / "results" / readme.CHART).unlink()
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    pytest.importorskip("matplotlib")
    readme.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "fwd ms" in text
    assert (tmp_path / "results" / readme.CHART).exists()
