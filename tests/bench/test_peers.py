"""Peers: why one can't run, the same block on one's experts, and a child that is watched."""

import json
import os
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from moe_kernels.bench import peers
from moe_kernels.bench.shapes import SHAPES

TINY = SHAPES["tiny"]


def without(monkeypatch, *missing):
    """Every module can be imported but these."""
    found = lambda name: None if name in missing else object()  # noqa: E731
    monkeypatch.setattr(peers.importlib.util, "find_spec", found)


# Why one can't run


def test_a_missing_package(monkeypatch):
    without(monkeypatch, "liger_kernel", "quack", "cutlass")
    assert peers.available() == {
        "liger": "not installed: no module named liger_kernel",
        "sonicmoe": "not installed: no module named quack, cutlass",
    }


def test_no_gpu(monkeypatch):
    without(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(peers.available().values()) == {"no CUDA GPU"}
    assert peers.measure_peer("liger", TINY) == {"reason": "no CUDA GPU"}


def test_an_architecture_without_kernels(monkeypatch):
    without(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert peers.available() == {"liger": None, "sonicmoe": "has no kernels for compute capability 8.6"}


@pytest.mark.parametrize(
    "call", [lambda: peers.peer_block("scatter", TINY, None), lambda: peers.measure_peer("scatter", TINY)]
)
def test_an_unknown_peer(call):
    with pytest.raises(ValueError, match="name must be one of liger, sonicmoe, got 'scatter'"):
        call()


# The block


def liger(x, gate_up, down, indices, weights):
    """What LigerFusedMoEFunction is documented to compute."""
    assert indices.dtype == torch.int32
    return experts(x, gate_up, down, indices, weights)


def sonicmoe(x, scores, tokens, indices, w1, b1, w2, b2, E, stream_id, activation_type, concat_layout, **rest):
    """What moe_general_routing_inputs is documented to compute: slots in token order, gate rows before up rows."""
    assert b1 is None and b2 is None and concat_layout and activation_type == "SWIGLU"
    assert tokens.dtype == indices.dtype == torch.int32
    assert tokens.equal(torch.arange(TINY.T).repeat_interleave(TINY.K).int())
    assert (w1.shape, w2.shape) == ((2 * TINY.I, TINY.D, E), (TINY.D, TINY.I, E))
    assert w1.stride()[1] == 1 and w2.stride()[1] == 1, "a copy, or another layout"
    slots = indices.view(-1, TINY.K), scores.view(-1, TINY.K)
    return experts(x, w1.permute(2, 0, 1), w2.permute(2, 0, 1), *slots), None


def experts(x, gate_up, down, indices, weights):
    from moe_kernels.functional import moe_experts, routing_plan

    return moe_experts(x, weights, routing_plan(indices.long(), gate_up.shape[0]), gate_up, down)


@pytest.mark.parametrize("name", peers.PEERS)
def test_the_block_with_a_peers_experts(name, monkeypatch):
    """With a stand-in for the package: same parameters, same routing, same result and gradients as stock."""
    from moe_kernels.bench.layer import build_block

    functions = {"LigerFusedMoEFunction": types.SimpleNamespace(apply=liger), "moe_general_routing_inputs": sonicmoe}
    enums = types.SimpleNamespace(ActivationType=types.SimpleNamespace(SWIGLU="SWIGLU"))
    for module in ("liger_kernel", "liger_kernel.ops", "sonicmoe"):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    block = build_block(TINY, "cpu").float()
    x = torch.randn(1, TINY.T, TINY.D, requires_grad=True)
    leaves = [x, *block.parameters()]
    d_out = torch.randn_like(x)
    results = []
    for run in (block, peers.peer_block(name, TINY, block)):
        out = run(x)
        results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    for stock, found in zip(*results, strict=True):
        assert found.shape == stock.shape
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)


# The watch


def watched(code, **limits):
    """Run Python code in a child; in it, ``say`` is peers.say."""
    code = f"import os, subprocess, sys, time\nsay = lambda m: print({peers._MARK!r} + m, flush=True)\n{code}"
    limits = {"start": 20, "first call": 20} | {name.replace("_", " "): limit for name, limit in limits.items()}
    return peers.watch([sys.executable, "-c", code], limits, "start", os.environ)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_result_of_a_child():
    message = json.dumps({"row": {"step_ms": 1.5}})
    code = f"print('noise'); say('{{\"stage\": \"first call\"}}'); print('more ', end=''); say({message!r})"
    assert watched(code) == {"row": {"step_ms": 1.5}}


def test_a_child_that_stays_too_long_is_killed_with_its_workers(tmp_path):
    pids = tmp_path / "pids"
    code = f"""
child = subprocess.Popen(["sleep", "60"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
say('{{"stage": "first call"}}')
time.sleep(60)"""
    start = time.monotonic()
    assert watched(code, first_call=0.5) == {"reason": "first call not finished in 0.5 s"}
    assert time.monotonic() - start < 10
    deadline = time.monotonic() + 5  # nobody waits for a worker's end
    while any(map(alive, pids.read_text().split())):
        assert time.monotonic() < deadline, "still alive"
        time.sleep(0.01)


def test_a_silent_child_is_in_its_first_stage():
    assert watched("time.sleep(60)", start=0.5) == {"reason": "start not finished in 0.5 s"}


def test_a_child_that_fails_says_why():
    code = "say('{\"stage\": \"first call\"}'); print('tuning'); print('1 of 80'); raise RuntimeError('no such kernel')"
    reason = watched(code)["reason"]
    assert reason.startswith("first call failed with exit status 1; stderr: Traceback")
    assert reason.endswith("RuntimeError: no such kernel; stdout: tuning | 1 of 80")


def test_a_child_that_fails_without_a_word():
    assert watched("sys.exit(3)") == {"reason": "start failed with exit status 3"}


def test_a_reason_quotes_the_last_lines_only():
    code = "[print(i, file=sys.stderr) for i in range(9)]; print('x' * 999, end='', flush=True); time.sleep(60)"
    reason = watched(code, start=1)["reason"]
    assert reason == "start not finished in 1 s; stderr: 6 | 7 | 8"
    code = "print('x' * 999); sys.exit(3)"
    assert watched(code)["reason"] == f"start failed with exit status 3; stdout: {'x' * 200}"


@pytest.mark.parametrize("cores, workers", [(None, "2"), (2, "2"), (5, "3"), (16, "4"), (128, "4")])
def test_a_peer_compiles_ahead_and_keeps_its_choice(monkeypatch, cores, workers):
    for name in ("QUACK_COMPILE_WORKERS", "QUACK_CACHE_AUTOTUNING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    found = peers.environment()
    assert (found["QUACK_COMPILE_WORKERS"], found["QUACK_CACHE_AUTOTUNING"]) == (workers, "1")
    assert found["PATH"] == os.environ["PATH"]


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("QUACK_COMPILE_WORKERS", "1")
    monkeypatch.setenv("QUACK_CACHE_AUTOTUNING", "0")
    found = peers.environment()
    assert (found["QUACK_COMPILE_WORKERS"], found["QUACK_CACHE_AUTOTUNING"]) == ("1", "0")
