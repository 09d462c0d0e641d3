"""``moe-kernels finetune`` as users run it, with few steps."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_kernels.cli import RunError, UsageError, first_line, results
from moe_kernels.cli.output import OutputDir

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

STEPS = 24


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "moe_kernels", "finetune", *map(str, arguments)]


def environment() -> dict:
    # One thread: on a busy machine a second one mostly waits for its turn.
    return {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments, cwd=None, **variables):
    env = {**environment(), **variables}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=env, cwd=cwd)


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """One run against stock, shared by the tests that look at it."""
    output = tmp_path_factory.mktemp("compared") / "not" / "there" / "yet"
    done = run("--output-dir", output, "--compare", "--max-steps", STEPS, "--batch-size", 4, "--seq-len", 64)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    return SimpleNamespace(output=output, summary=summary, stdout=done.stdout, stderr=done.stderr)


# A run that goes well


@pytest.mark.slow
def test_files(compared):
    found = {path.name for path in compared.output.iterdir()}
    assert found == {"summary.json", "loss.png", "expert_load.png", "checkpoint"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (compared.output / "checkpoint").iterdir()
    }
    for picture in ("loss.png", "expert_load.png"):
        assert (compared.output / picture).read_bytes().startswith(b"\x89PNG")
    assert os.listdir(compared.output.parent) == [compared.output.name], "something was left beside the output"


@pytest.mark.slow
def test_loss_falls_and_follows_stock(compared):
    ours, stock = compared.summary["runs"]["moe_kernels"], compared.summary["runs"]["stock"]
    assert len(ours["losses"]) == len(stock["losses"]) == len(ours["step_seconds"]) == STEPS
    # Same weights, batches and order: the first step differs by rounding only.
    assert ours["losses"][0] == pytest.approx(stock["losses"][0], rel=1e-4)
    assert ours["losses"][0] > 5 and ours["loss_last"] < 4
    window = compared.summary["runs"]["moe_kernels"]["loss_window"]
    assert window == STEPS // 2
    assert ours["loss_last"] == pytest.approx(sum(ours["losses"][-window:]) / window)
    assert abs(compared.summary["comparison"]["last_loss_difference_percent"]) < 2


@pytest.mark.slow
def test_reload_in_a_fresh_stock_process(compared):
    check = compared.summary["checks"]["reload_with_stock_transformers"]
    assert check["passed"] and check["relative_difference"] <= check["tolerance"] == 1e-4
    assert check["held_out_loss"] == pytest.approx(compared.summary["runs"]["moe_kernels"]["held_out_loss"], rel=1e-4)


@pytest.mark.slow
def test_summary_says_what_ran_where(compared):
    summary = compared.summary
    assert set(summary["versions"]) == {"moe_kernels", "python", "torch", "triton", "transformers"}
    assert summary["device"]["type"] in ("cpu", "cuda") and summary["device"]["name"]
    assert summary["arguments"]["max_steps"] == STEPS and summary["arguments"]["compare"] is True
    assert summary["data"]["train_sequences"] > 0 and summary["data"]["held_out_sequences"] > 0
    for one in summary["runs"].values():
        assert one["tokens_per_second"] > 0 and one["peak_bytes"] > 0
    assert [set(row) for row in summary["report"]] == [set(results.REPORT_FIELDS)] * 4
    assert summary["checks"]["accelerated"]["of"] == 4
    assert len(summary["expert_load"]) == 4
    for shares in summary["expert_load"].values():
        assert len(shares) == 16 and sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_table(compared):
    for word in ("moe_kernels", "stock", "tokens/s", "peak memory", "loss, last 12 steps", "held-out loss"):
        assert word in compared.stdout
    assert "accelerated layers: " in compared.stdout
    assert "reloaded with stock Transformers in a fresh process" in compared.stdout
    assert "FAILED" not in compared.stdout
    assert "Traceback" not in compared.stderr and "Warning" not in compared.stderr


@pytest.mark.slow
def test_checkpoint_jsonl_bfloat16_and_overwrite(compared, tmp_path):
    """Goes on from a checkpoint of its own, on the user's text, over the output of an earlier run."""
    text = tmp_path / "text.jsonl"
    line = json.dumps({"text": "the quick brown fox jumps over the lazy dog; " * 40})
    text.write_text("\n".join([line] * 3) + "\n\n")
    output = tmp_path / "run"
    output.mkdir()
    (output / "summary.json").write_text("{}")
    (output / "old.txt").write_text("from the earlier run")
    model = compared.output / "checkpoint"
    options = ("--max-steps", 2, "--batch-size", 3, "--seq-len", 32, "--dtype", "bfloat16", "--lr", "1e-3")
    done = run("--model", model, "--data", text, "--output-dir", output, "--overwrite", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert not (output / "old.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["run", "text.jsonl"]
    assert summary["checks"]["reload_with_stock_transformers"]["tolerance"] == 1e-2
    assert summary["device"]["dtype"] == "bfloat16" and "stock" not in summary["runs"]
    config = json.loads((output / "checkpoint" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "moe_kernels" not in json.dumps(config)


# Bad input: one line that names the argument, exit code 2, nothing left behind


def refused(tmp_path, *arguments, **variables) -> str:
    output = tmp_path / "a" / "b" / "run"
    done = run("--output-dir", output, *arguments, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("moe-kernels finetune: error: ")
    assert not (tmp_path / "a").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--max-steps", "0", "positive integer, got '0'"),
        ("--seq-len", "-3", "positive integer, got '-3'"),
        ("--seq-len", "1", "must be at least 2, got '1': each token predicts the next"),
        ("--model", "", "must name something, got ''"),
        ("--data", "", "must name something, got ''"),
        ("--output-dir", "", "must name something, got ''"),
        ("--model", "m" * 300, "File name too long"),
        ("--data", "d" * 300, "File name too long"),
        ("--output-dir", "/tmp/" + "o" * 300, "File name too long"),
        ("--batch-size", "1.5", "positive integer, got '1.5'"),
        ("--lr", "nan", "positive number, got 'nan'"),
        ("--dtype", "int8", "'auto', 'float32', 'bfloat16'"),
        ("--model", "/does/not/exist", "no such directory: /does/not/exist"),
        ("--data", "/does/not/exist.txt", "no such file or directory: /does/not/exist.txt"),
    ],
)
def test_bad_value(tmp_path, option, value, expected):
    message = refused(tmp_path, f"{option}={value}")
    assert option in message and expected in message


@pytest.mark.parametrize(
    ("forced", "expected"),
    [("triton", "no Triton kernels for device type cpu"), ("cuda", "can't run"), ("foo", "must be one of")],
)
def test_forced_backend_that_cannot_run(tmp_path, forced, expected):
    import torch

    if torch.cuda.is_available() and forced != "foo":
        pytest.skip("it may run here")
    message = refused(tmp_path, MOE_KERNELS_BACKEND=forced, TRITON_INTERPRET="0")
    assert "MOE_KERNELS_BACKEND" in message and expected in message


def test_first_line_of_an_error():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError("field 'x':\n  not a number\nmore")) == "field 'x': not a number"
    assert first_line(ValueError(" ")) == "ValueError"


def test_model_without_config(tmp_path):
    (tmp_path / "model").mkdir()
    assert "--model" in (message := refused(tmp_path, "--model", tmp_path / "model")) and "config.json" in message


@pytest.mark.slow
def test_dense_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from moe_kernels.cli.tiny_model import byte_tokenizer

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes)).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    message = refused(tmp_path, "--model", tmp_path / "dense")
    assert "--model" in message and "LlamaForCausalLM" in message and "has no MoE layers" in message


@pytest.mark.slow
def test_sequence_longer_than_the_model(compared, tmp_path):
    message = refused(tmp_path, "--model", compared.output / "checkpoint", "--seq-len", 65)
    assert "--seq-len: 65 is longer than the model's 64 positions" in message


def copied(compared, tmp_path) -> Path:
    return Path(shutil.copytree(compared.output / "checkpoint", tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("model.safetensors", "not weights", "--model: can't load"),
        ("config.json", '{"model_type": "qwen3_moe", "num_experts": "eight"}', "'num_experts'"),
        ("tokenizer.json", '{"version": "1.0", "model": 3}', "no tokenizer that loads"),
    ],
)
def test_broken_checkpoint(compared, tmp_path, file, content, expected):
    model = copied(compared, tmp_path)
    (model / file).write_text(content)
    message = refused(tmp_path, "--model", model, "--seq-len", 32, "--max-steps", 1)
    assert "--model: " in message and expected in message


@pytest.mark.slow
def test_weights_that_are_not_there(compared, tmp_path):
    from safetensors.torch import load_file, save_file

    file = copied(compared, tmp_path) / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if ".experts." not in name}
    save_file(weights, file, metadata={"format": "pt"})
    message = refused(tmp_path, "--model", file.parent, "--seq-len", 32, "--max-steps", 1)
    assert "lacks 8 of the weights the model needs (model.layers.0.mlp.experts.down_proj, " in message


@pytest.mark.slow
def test_tokenizer_that_is_not_there(compared, tmp_path):
    model = copied(compared, tmp_path)
    for file in model.glob("tokenizer*"):
        file.unlink()
    message = refused(tmp_path, "--model", model, "--seq-len", 32, "--max-steps", 1)
    assert "--model: its tokenizer turns text into no tokens" in message


def test_bad_data_from_the_command(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("nonsense\n")
    assert "--data" in (message := refused(tmp_path, "--data", path)) and "line 1" in message


# The output directory


def test_output_that_must_not_be_replaced(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        OutputDir(tmp_path, overwrite=False)
    with pytest.raises(UsageError, match="isn't an earlier run"):
        OutputDir(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="is not a directory"):
        OutputDir(tmp_path / "precious" / "run", overwrite=False)
    with pytest.raises(UsageError, match="is not a directory"):
        OutputDir(tmp_path / "precious", overwrite=False)


def test_failure_keeps_the_earlier_run(tmp_path):
    old = tmp_path / "run"
    old.mkdir()
    (old / "summary.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), OutputDir(old, overwrite=True) as output:
        (output.staging / "half").write_text("")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["run"] and os.listdir(old) == ["summary.json"]


def written(directory: OutputDir) -> None:
    (directory.staging / "summary.json").write_text("{}")
    (directory.staging / "checkpoint").mkdir()
    (directory.staging / "checkpoint" / "weights").write_text("")


def test_empty_directory_is_filled_from_inside(tmp_path, monkeypatch):
    """It may be a mount point or have a parent that can't be written in, as with docker -v: nothing is renamed over."""
    target = tmp_path / "mounted"
    target.mkdir()
    moved = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (moved.append(Path(b).name), rename(a, b)))
    inode = target.stat().st_ino
    with OutputDir(target, overwrite=False) as output:
        assert output.staging.parent == target and os.listdir(tmp_path) == ["mounted"]
        written(output)
        output.publish()
    assert target.stat().st_ino == inode
    assert moved == ["checkpoint", "summary.json"]
    assert sorted(os.listdir(target)) == ["checkpoint", "summary.json"] and os.listdir(tmp_path) == ["mounted"]


def test_failure_leaves_an_empty_directory_empty(tmp_path):
    with pytest.raises(RunError, match="there already"), OutputDir(tmp_path, overwrite=False) as output:
        written(output)
        (output.staging / "a.png").write_text("")
        (tmp_path / "summary.json").write_text("somebody else's")
        output.publish()
    assert os.listdir(tmp_path) == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "somebody else's"


@pytest.mark.parametrize("failing", [1, 2])
def test_rename_that_fails_keeps_the_earlier_run(tmp_path, monkeypatch, failing):
    old = tmp_path / "run"
    old.mkdir()
    (old / "summary.json").write_text("old")
    replace, calls = os.replace, []

    def failing_replace(a, b):
        calls.append(a)
        if len(calls) == failing:
            raise OSError(16, "Device or resource busy")
        replace(a, b)

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(RunError, match="busy"), OutputDir(old, overwrite=True) as output:
        written(output)
        output.publish()
    assert os.listdir(tmp_path) == ["run"] and (old / "summary.json").read_text() == "old"


def test_mount_point_with_an_earlier_run(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(UsageError, match="is a mount point"):
        OutputDir(tmp_path, overwrite=True)


@pytest.mark.slow
def test_current_directory_and_a_single_step(tmp_path):
    (tmp_path / "here").mkdir()
    options = ("--compare", "--max-steps", 1, "--batch-size", 1, "--seq-len", 16, "--data", __file__)
    paths = os.pathsep.join(path for path in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if path)
    done = run("--output-dir", ".", *options, cwd=tmp_path / "here", PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["here"]
    found = sorted(os.listdir(tmp_path / "here"))
    assert found == ["checkpoint", "expert_load.png", "loss.png", "summary.json"]
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["comparison"]["tokens_per_second_ratio"] is None
    assert all(one["warm_up_steps"] == 0 for one in summary["runs"].values())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing(tmp_path, how):
    output = tmp_path / "new" / "run"
    process = subprocess.Popen(
        command("--output-dir", output, "--max-steps", 100000, "--data", __file__, "--seq-len", 32),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        # Until the training process is at work.
        while not list(tmp_path.glob("new/.run.partial-*/scratch/moe_kernels.json")):
            assert process.poll() is None and time.monotonic() < deadline, "training never began"
            time.sleep(0.1)
        time.sleep(1)
        child = children(process.pid)
        process.send_signal(how)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    assert not (tmp_path / "new").exists()
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in child), "the training process lives on"


def children(pid: int) -> list[str]:
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return listing.read_text().split() if listing.exists() else []


@pytest.mark.slow
def test_run_that_breaks_down(compared, tmp_path):
    """An error in a training step is shown, and nothing is written."""
    model = copied(compared, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 99}))
    options = ("--max-steps", 1, "--batch-size", 1, "--seq-len", 16)
    done = run("--model", model, "--output-dir", tmp_path / "a" / "run", *options)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr and done.stderr.endswith("nothing was written\n")
    assert not (tmp_path / "a").exists()


# Checks


def summarized(on_gpu=False, accelerated=True, reloaded=2.0, last=2.0):
    ours = {
        "losses": [5.0, last],
        "held_out_loss": 2.0,
        "tokens_per_second": 10.0,
        "peak_bytes": 10,
        "report": [{"accelerated": accelerated, "reason": ""}],
    }
    reload = {"held_out_loss": reloaded, "expert_load": {}}
    return results.summarize(ours=ours, stock=None, reloaded=reload, tolerance=1e-4, on_gpu=on_gpu, about={})


def passed(summary) -> dict:
    return {name: check["passed"] for name, check in summary["checks"].items()}


def test_checks_pass():
    assert all(passed(summarized(on_gpu=True)).values())
    assert all(passed(summarized(accelerated=False)).values()), "a CPU may run stock code"


@pytest.mark.parametrize(
    ("case", "check"),
    [
        ({"reloaded": 2.001}, "reload_with_stock_transformers"),
        ({"reloaded": math.nan}, "reload_with_stock_transformers"),
        ({"last": math.nan}, "loss_is_finite"),
        ({"on_gpu": True, "accelerated": False}, "accelerated"),
    ],
)
def test_a_failed_check_shows(case, check):
    summary = summarized(**case)
    assert [name for name, ok in passed(summary).items() if not ok] == [check]
    json.dumps(summary, allow_nan=False)
