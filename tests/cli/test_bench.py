"""``moe-kernels bench``: what it refuses, its table and its picture. What it measures: tests/bench."""

import os
import subprocess
import sys
import types

import pytest
import torch

from moe_kernels.bench import results
from moe_kernels.cli import bench, charts, main, tune

pytest.importorskip("matplotlib")

MACHINE = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}, "copy_tb_per_s": 3.004, "matmul_tflops": 793.5}


def run(*arguments, **variables):
    command = [sys.executable, "-m", "moe_kernels", "bench", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def row(step_ms: float, held: float, peak: float, **more) -> dict:
    times = {"forward_ms": step_ms / 3, "backward_ms": 2 * step_ms / 3, "step_ms": step_ms, "step_tflops": 378.0}
    return {**times, "held_mib": held, "peak_mib": peak, **more}


ROWS = {
    "block/qwen3-30b/uniform/eager": row(297.25, 2347, 4370),
    "block/qwen3-30b/uniform/grouped_mm": row(20.0, 1805, 3340),
    "block/qwen3-30b/uniform/liger": row(11.0, 450, 2000),
    "block/qwen3-30b/uniform/moe_kernels": row(8.25, 395, 1227),
    "block/qwen3-30b/uniform/moe_kernels_triton": row(9.0, 395, 1227),
    "experts/qwen3-30b/uniform/moe_kernels": row(7.5, 385, 1217, step_over_bound=1.234),
    "experts/qwen3-30b/zipf/moe_kernels": row(8.0, 385, 1217, step_over_bound=1.3),
    "bound/qwen3-30b": {"step_ms": 6.1},
    "error/qwen3-30b/eager": {"out": 0.004},
    "block/olmoe-7b/uniform/grouped_mm": row(22.0, 2057, 3592),
    "block/olmoe-7b/uniform/moe_kernels": row(10.5, 519, 1289),
}


def file_of(rows: dict[str, dict]) -> dict:
    return {"machines": {"key": MACHINE}, "rows": {name: {**row, "machine": "key"} for name, row in rows.items()}}


# What it refuses


def test_without_a_gpu_it_is_one_line(tmp_path):
    done = run("--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "needs an NVIDIA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tuning_without_a_gpu_is_one_line():
    done = run("--tune", "--op", "gate_up")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--tune" in done.stderr and "needs an NVIDIA GPU" in done.stderr


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("--shape", "qwen3-40b"), "qwen3-40b"),
        (("--routing", "skewed"), "skewed"),
        (("--save", "--output-dir", "x"), "--output-dir"),
        (("--output-dir", ""), "--output-dir"),
        (("--nonsense",), "--nonsense"),
        (("--tune", "--op", "gate_down"), "'gate_down' (choose from 'gate_up', 'grouped_gemm'"),
        (("--tune", "--shape", "qwen3-40b"), "qwen3-40b"),
        (("--op", "gate_up"), "--op goes with --tune"),
        (("--write",), "--write goes with --tune"),
        (("--tune", "--peers"), "--peers"),
        (("--tune", "--save"), "--save"),
    ],
    ids=[
        *("shape", "routing", "two-places", "empty-name", "unknown"),
        *("tune-op", "tune-shape", "op-alone", "write-alone", "tune-peers", "tune-save"),
    ],
)
def test_bad_arguments_are_one_line(arguments, word):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and word in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "block.json").write_text("[1]")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "block.json").write_text("{")
    for place, reason in (
        ("file", "is not a directory"),
        ("file/below", "is not a directory"),
        ("other", "holds no results of a benchmark"),
        ("broken", "can't use"),
        ("x" * 300, "can't use"),
    ):
        done = run("--output-dir", tmp_path / place)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "--output-dir" in done.stderr and reason in done.stderr


def test_save_needs_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    arguments = type("Arguments", (), {"save": True})
    with pytest.raises(bench.UsageError, match="--save: moe_kernels does not run from a checkout"):
        bench._directory(arguments)


def test_save_names_its_place_when_it_cannot_be_used(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(results, "results_dir", lambda: tmp_path / "file" / "a-gpu")
    with pytest.raises(bench.UsageError, match=r"--save: .*file is not a directory"):
        bench._directory(types.SimpleNamespace(save=True))

    def refuse(directory):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(bench.RunError, match=r"--save: can't write in .*a-gpu \(Permission denied\)"):
        bench._write(types.SimpleNamespace(save=refuse), tmp_path / "a-gpu", "--save")


def test_writing_tuned_rows_needs_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    arguments = type("Arguments", (), {"peers": False, "save": False, "write": True})
    with pytest.raises(bench.UsageError, match="--write: moe_kernels does not run from a checkout"):
        tune.run(arguments)


# A run


@pytest.fixture
def measuring(monkeypatch):
    """``measuring(run)`` puts ``run(session, case)`` in place of a measurement."""
    from moe_kernels.bench import block, session

    monkeypatch.delenv("MOE_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(bench.machine, "gpu", lambda: MACHINE["gpu"])
    monkeypatch.setattr(session.Session, "machine", MACHINE)
    return lambda run: monkeypatch.setattr(block, "run", run)


def arguments(shape, place):
    names = ["bench", "--shape", shape, "--output-dir", str(place)]
    return main.parser().parse_args(names)


def test_what_is_left_out_is_said(measuring, capsys, tmp_path):
    measuring(lambda session, case: session.record("block.json", case.name, row(8.0, 300, 900)))
    assert bench.run(arguments("qwen3.5-35b", tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "block/qwen3.5-35b/uniform/eager: left out: a step would loop over 256 experts" in shown
    assert "block/qwen3.5-35b/uniform/batched_mm: left out: it would copy 2304 GiB" in shown


@pytest.mark.parametrize(
    "error", [RuntimeError("an illegal memory access"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_rows_from_before_a_crash_are_saved(measuring, tmp_path, error):
    def run(session, case):
        if session.rows:
            raise error
        session.record("block.json", case.name, row(8.0, 300, 900))

    measuring(run)
    with pytest.raises(type(error)):
        bench.run(arguments("tiny", tmp_path / "out"))
    assert list(results.load(tmp_path / "out" / "block.json")["rows"]) == ["block/tiny/uniform/eager"]


# The suite in benchmarks/


@pytest.mark.parametrize(
    "options, said",
    [
        ((), ("test_peers.py", "left out: it would copy 3456 GiB of weights")),
        (("--no-peers", "--shape", "tiny"), ("test_decode.py", "measured on qwen3-30b only")),
        (("--all-shapes", "--peer-minutes", "0.5"), ("test_ops.py", "test_peers.py")),
    ],
    ids=["all", "another-shape", "all-shapes"],
)
def test_the_suite_without_a_gpu(options, said):
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "benchmarks", *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=results.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stdout for word in said)
    assert ("test_peers.py" in done.stdout) == ("--no-peers" not in options)
    assert "passed" not in done.stdout and "no CUDA device" in done.stdout


# What it shows


def show(capsys, rows, **more) -> str:
    bench.show(rows, MACHINE, more.get("failures", []), more.get("notes", []), more.get("written", []))
    return capsys.readouterr().out


def test_table(capsys):
    shown = show(capsys, ROWS)
    for word in ("NVIDIA H100", "3.00 TB/s", "794 TFLOP/s", "block, eager", "experts, moe_kernels, zipf", "x bound"):
        assert word in shown
    (line,) = (line for line in shown.splitlines() if "experts, moe_kernels " in line and "zipf" not in line)
    assert " ".join(line.replace("│", " ").split()) == "experts, moe_kernels 2.50 5.00 7.50 378 1.23 385 1217"
    assert shown.count("qwen3-30b") == 1, "the shape is said once"
    assert "error" not in shown and "bound/" not in shown


def test_table_of_rows_that_lack_figures(capsys):
    shown = show(capsys, {"block/qwen3-30b/uniform/moe_kernels": {"forward_ms": 2.7, "held_mib": 395.0}})
    assert "2.70" in shown and "395" in shown


def test_failures_and_reasons_stand_below(capsys, tmp_path):
    shown = show(capsys, {}, failures=["a [wrong] result"], notes=["liger: not installed"], written=[tmp_path / "x"])
    assert "FAILED a [wrong] result" in shown and "liger: not installed" in shown and "written to" in shown


# What --tune shows


def test_tuned_table(capsys):
    tuner = pytest.importorskip("moe_kernels.bench.tune")
    row = tuner.configs.Tiles(128, 64, 8, 4)
    key, other = ("gate_up", 2, 128), ("gate_up", 2, 16)
    flops = int(8e11)
    group = [
        tuner.Trial(key, row, True, flops=flops, ms=1.6),
        tuner.Trial(key, row._replace(group_m=16), False, flops=flops, ms=1.5),
        tuner.Trial(key, row._replace(num_stages=5), False, dropped="1 x 272 KiB of shared memory, of 227"),
    ]
    same = [tuner.Trial(other, row, True, flops=flops, ms=1.6), tuner.Trial(other, row, False, flops=flops, ms=1.59)]
    tune.show({key: group, other: same}, MACHINE["gpu"]["name"], ["qwen3-30b"])
    shown = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    best = lines.index("gate_up 128 Tiles(128, 64, 8, 4, group_m=16) 1.5000 533 0.938")
    assert lines[best + 1] == "Tiles(128, 64, 8, 4) 1.6000 500 1.000"
    assert "dropped: gate_up 128 Tiles(128, 64, 8, 5): 1 x 272 KiB of shared memory, of 227" in lines
    assert "1 of 2 rows would be better by 2% or more" in lines
    row = (
        '("gate_up", 2, 128): Tiles(128, 64, 8, 4, group_m=16), # tuned: 533 TFLOP/s on NVIDIA H100 80GB HBM3, was 500'
    )
    assert lines[-1] == row


# The picture


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        {name: row for name, row in ROWS.items() if name.startswith("block/olmoe")},
        {"block/olmoe-7b/uniform/moe_kernels": {"step_accumulate_ms": 9.0, "held_mib": 395.0, "peak_mib": 1227.0}},
    ],
    ids=["all", "without-bound", "adding"],
)
def test_chart(tmp_path, rows):
    assert charts.layers(tmp_path / "bench.png", file_of(rows))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bound/qwen3-30b", "block/sonic-7b-n256/uniform/sonicmoe"])
def test_nothing_is_drawn_without_blocks(tmp_path, name):
    assert not charts.layers(tmp_path / "bench.png", file_of({name: {"step_ms": 6.1}}))
    assert not (tmp_path / "bench.png").exists()


def test_a_peer_that_was_stopped_after_its_forward_is_not_drawn(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(charts, "_step_bars", lambda axis, places, *rest: drawn.extend(places))
    peer = {"forward_ms": 3.0, "reason": "first call not finished in 240 s"}
    charts.layers(tmp_path / "bench.png", file_of(ROWS | {"block/olmoe-7b/uniform/sonicmoe": peer}))
    assert drawn and ("olmoe-7b", "sonicmoe") not in drawn


def test_a_bar_that_dwarfs_the_others_is_cut(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(charts, "_step_bars", lambda axis, *rest: drawn.append((axis, rest)))
    charts.layers(tmp_path / "bench.png", file_of(ROWS))
    ((axis, rest),) = drawn
    monkeypatch.undo()
    charts._step_bars(axis, *rest)
    texts = [text.get_text().strip() for text in axis.texts]
    assert "297 →" in texts and "22.0" in texts and "8.2" in texts
    assert axis.get_xlim()[1] < 30


# A whole run, on a GPU


@pytest.mark.gpu
def test_a_run(tmp_path):
    command = [sys.executable, "-m", "moe_kernels", "bench", "--shape", "tiny", "--output-dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"block.json", "bench.png"}
    assert "experts, moe_kernels_recompute" in done.stdout
    assert torch.cuda.get_device_name() in done.stdout


@pytest.mark.gpu
def test_a_tuning(tmp_path):
    command = [sys.executable, "-m", "moe_kernels", "bench", "--tune", "--shape", "tiny", "--op", "grouped_wgrad_lhs"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name() in done.stdout and "1.000" in done.stdout
