"""``moe-kernels finetune`` as users run it, with few steps."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_kernels.cli import UsageError, results
from moe_kernels.cli.output import OutputDir

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

STEPS = 24


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "moe_kernels", "finetune", *map(str, arguments)]


def environment() -> dict:
    # One thread: on a busy machine a second one mostly waits for its turn.
    return {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment())


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


def refused(tmp_path, *arguments) -> str:
    output = tmp_path / "a" / "b" / "run"
    done = run("--output-dir", output, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("moe-kernels finetune: error: ")
    assert not (tmp_path / "a").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--max-steps", "0", "positive integer, got '0'"),
        ("--seq-len", "-3", "positive integer, got '-3'"),
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


@pytest.mark.slow
def test_broken_weights(compared, tmp_path):
    import shutil

    shutil.copytree(compared.output / "checkpoint", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    message = refused(tmp_path, "--model", tmp_path / "broken", "--seq-len", 32, "--max-steps", 1)
    assert "--model: can't load" in message


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
def test_run_that_breaks_down(tmp_path):
    """A forced backend that can't run: the error is shown, nothing is written."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    done = subprocess.run(
        command("--output-dir", tmp_path / "run", "--max-steps", 1, "--batch-size", 1, "--seq-len", 16),
        capture_output=True,
        text=True,
        env={**environment(), "MOE_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 1
    assert "the forced backend can't run" in done.stderr
    assert done.stderr.endswith("nothing was written\n")
    assert not list(tmp_path.iterdir())


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
