"""The first call of a layer in a process of its own: its row, and how the process is started."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_kernels.bench import first_layer, layer
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.shapes import SHAPES

TINY = SHAPES["tiny"]


@pytest.fixture(autouse=True)
def cache(clock, monkeypatch, tmp_path):
    """Triton's, with what two kernels leave there, one of them for two sizes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for place, name in (("a", "route_kernel"), ("b", "route_kernel"), ("c", "combine_kernel")):
        (tmp_path / place).mkdir()
        for kind in ("cubin", "ptx", "json"):
            (tmp_path / place / f"{name}.{kind}").touch()
    return tmp_path


@pytest.mark.parametrize("what", first_layer.WHAT)
def test_the_row(what):
    started = time.time() - 2
    ((name, row),) = first_layer.measure(what, TINY, started, "cpu").items()
    assert name == f"layer/tiny/first_{what}"
    assert row["import_s"] >= 2 and row["first_step_s"] >= row["build_s"] > 0
    assert row["compilations_first"] == 3 and row["compiled_first"] == "combine_kernel route_kernel route_kernel"
    forward = {"topk_route", "routing_plan", "gate_up", "grouped_gemm", "combine"}
    backward = {"d_activation", "grouped_wgrad", "topk_route_bwd"}
    assert set(row["on_reference"].split()) == (forward if what == "forward" else forward | backward)


def test_without_triton_nothing_was_compiled(cache, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache / "nothing"))
    (row,) = first_layer.measure("forward", TINY, time.time(), "cpu").values()
    assert row["compilations_first"] == 0 and "compiled_first" not in row


@pytest.mark.parametrize("place, which", [(0, "out"), (1, "dw_gate_up"), (2, "dw_down")])
def test_a_layer_that_is_wrong_has_no_row(monkeypatch, place, which):
    right, calls = layer.relative_l2, []

    def five_percent_off(value, truth):
        calls.append(None)
        return right(value * 1.05 if len(calls) == place + 1 else value, truth)

    monkeypatch.setattr(layer, "relative_l2", five_percent_off)
    with pytest.raises(Inaccurate, match=f"layer/tiny/first_step: {which} has a relative error of 5"):
        first_layer.measure("step", TINY, time.time(), "cpu")


def test_the_process_is_fresh(monkeypatch):
    seen = {}

    def watch(command, limits, stage, environment):
        seen.update(command=command, stage=stage, cache=environment["TRITON_CACHE_DIR"])
        assert stage in limits and not Path(environment["TRITON_CACHE_DIR"]).exists()
        return {"layer": {}}

    monkeypatch.setattr(first_layer, "watch", watch)
    assert first_layer.measured("step") == {"layer": {}}
    assert seen["stage"] == "step" and seen["command"][:3] == [sys.executable, "-m", first_layer.__name__]
    monkeypatch.setattr(sys, "argv", ["first_layer", *seen["command"][3:]])
    measured = []
    monkeypatch.setattr(first_layer, "measure", lambda *arguments: measured.append(arguments))
    monkeypatch.setattr(first_layer, "say", lambda row: None)
    assert first_layer.main() == 0
    ((what, shape, started),) = measured
    assert (what, shape.name) == ("step", "qwen3-30b") and abs(started - time.time()) < 60


def test_nothing_is_imported_that_a_layer_does_not_need():
    """What is imported before the clock runs is not in the first step."""
    code = "import sys, moe_kernels.bench.first_layer; print({'triton', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["first_layer", "--what", "step"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        first_layer.main()
