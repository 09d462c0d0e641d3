"""``moe-kernels info`` as users run it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_kernels import __version__, backends
from moe_kernels.bench import machine
from moe_kernels.cli import info


def run(*arguments, **environment):
    command = [sys.executable, "-m", "moe_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160", **environment})


def test_table_names_versions_and_every_op():
    done = run("info")
    assert done.returncode == (0 if torch.cuda.is_available() else 1), done.stderr
    torch_version = torch.__version__.partition("+")[0]
    for word in ("torch", torch_version, "triton", "transformers", "GPU", "CUDA extension", *backends.OPS):
        assert word in done.stdout
    assert done.stderr == ""


def test_json_has_the_same_and_the_same_exit_code():
    done = run("info", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == (0 if facts["accelerated"] else 1)
    assert facts["versions"]["moe_kernels"] == __version__
    assert [row["op"] for row in facts["ops"]] == list(backends.OPS)
    for row in facts["ops"]:
        assert list(row["passed_over"]) == list(backends.ORDER[: backends.ORDER.index(row["backend"])])
        assert all(row["passed_over"].values())


def test_forced_backend_that_cannot_run_is_shown():
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    done = run("info", "--json", MOE_KERNELS_BACKEND="triton", TRITON_INTERPRET="0")
    facts = json.loads(done.stdout)
    assert facts["forced_backend"] == "triton"
    gate_up = next(row for row in facts["ops"] if row["op"] == "gate_up")
    assert gate_up["backend"] is None
    assert "no Triton kernels for device type cpu" in gate_up["passed_over"]["triton"]
    assert done.returncode == 1


def test_unknown_forced_backend_is_one_line():
    done = run("info", MOE_KERNELS_BACKEND="nonsense")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "MOE_KERNELS_BACKEND" in done.stderr and "nonsense" in done.stderr


def test_accelerated_needs_one_op_on_a_kernel(monkeypatch, capsys):
    facts = info.collect()
    monkeypatch.setattr(info, "collect", lambda: {**facts, "accelerated": True})
    assert info.run(type("Arguments", (), {"json": True})) == 0
    assert json.loads(capsys.readouterr().out)["accelerated"] is True


def test_gpu_and_extension_lines(capsys):
    """The lines of a machine that this one may not be."""
    facts = info.collect()
    facts["gpu"] = {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
        "memory_bytes": 80 * 2**30,
        "driver": "580.95.05",
        "torch_cuda": "13.0",
    }
    facts["extension"] = {
        "built": True,
        "architectures": "90a",
        "cuda_version": "13.0",
        "driver_supports_cuda": "13.0",
    }
    info.show(facts)
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("NVIDIA H100 80GB HBM3", "compute capability 9.0", "driver 580.95.05", "built for 90a", "CUDA 13.0"):
        assert word in shown


@pytest.mark.parametrize(
    ("device", "forced", "backend", "accelerated", "expected"),
    [
        (
            "cpu",
            None,
            "reference",
            False,
            "on a CPU, layers inside Hugging Face models run on the plain-torch reference.",
        ),
        ("cuda:0", None, "reference", False, "run Transformers' own code."),
        ("cuda:0", "reference", "reference", False, "run on plain torch."),
        ("cpu", "triton", None, False, "The forced backend triton can't run here: layers"),
        ("cuda:0", "cuda", None, True, "The forced backend cuda can't run here: layers"),
    ],
)
def test_last_line_says_what_layers_run_on(capsys, device, forced, backend, accelerated, expected):
    facts = info.collect()
    facts |= {"device": device, "forced_backend": forced, "accelerated": accelerated}
    facts["ops"] = [{"op": "gate_up", "backend": backend, "passed_over": {}}]
    info.show(facts)
    assert expected in " ".join(capsys.readouterr().out.split())


def test_nothing_to_add_where_kernels_run(capsys):
    facts = info.collect() | {"accelerated": True, "device": "cuda:0"}
    facts["ops"] = [{"op": "gate_up", "backend": "triton", "passed_over": {}}]
    info.show(facts)
    assert "layers inside" not in capsys.readouterr().out


def test_extension_says_why_it_is_not_there():
    found = machine.extension()
    assert found["built"] or "not built" in found["reason"]


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")])
def test_bad_arguments_are_one_line(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("moe-kernels") and done.stderr.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom moe_kernels.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('transformers', 'rich', 'matplotlib', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_missing_extra_is_named():
    code = "import sys; sys.modules['rich'] = None; from moe_kernels.cli.main import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs rich: pip install 'moe-kernels-train[finetune]'" in done.stderr
