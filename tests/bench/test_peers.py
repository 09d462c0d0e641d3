"""Peers: why one can't run, the same block on one's experts, and a child that is watched."""

import json
import os
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from moe_kernels.bench import block, measure, peers, session
from moe_kernels.bench.layer import Inaccurate
from moe_kernels.bench.measure import Measured
from moe_kernels.bench.shapes import SHAPES

TINY = SHAPES["tiny"]
SESSION = session.Session


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


@pytest.fixture
def here(monkeypatch, clock):
    """A peer that is stock, measured in this process on the CPU; what it says."""
    said = []
    monkeypatch.setattr(peers, "say", lambda message: said.append(json.loads(json.dumps(message))))
    stock = peers.PEERS["liger"]._replace(build=lambda experts, shape: experts)
    monkeypatch.setitem(peers.PEERS, "other", stock)
    monkeypatch.setattr(session, "Session", lambda: SESSION("cpu"))
    monkeypatch.setattr(measure, "medians_in_turn_ms", lambda runs: dict(zip(runs, (3.0, 2.0), strict=True)))
    monkeypatch.setattr(block, "measure", lambda forward, d_out: Measured(2.5, 5.0, 7.0, 8.0, 300.0, 900.0, 3.0))
    return said


def test_a_forward_is_said_before_the_backward(here):
    rows = peers.measure_here("other", TINY)
    stages = [message.get("stage", "so far") for message in here]
    assert stages == ["first call", "measurement", "so far", "first call", "measurement"]
    so_far = here[2]["so_far"]["block/tiny/uniform/other"]
    assert (so_far["forward_ms"], so_far["forward_over_moe_kernels"]) == (3, 1.5)
    assert set(so_far) == {"forward_ms", "forward_over_moe_kernels", "first_call_s"}
    row = rows["block/tiny/uniform/other"]
    assert (row["forward_over_moe_kernels"], row["step_over_moe_kernels"]) == (1.5, 1.5)
    assert (row["forward_ms"], row["step_ms"]) == (2.5, 7), "those of any block"
    assert row["first_call_s"] >= so_far["first_call_s"] and set(rows["error/tiny/other"]) >= {"out", "dx"}


@pytest.mark.parametrize("place, said", [("forward", 2), ("backward", 5)])
def test_a_peer_that_is_wrong_has_no_figure_of_that(here, monkeypatch, place, said):
    def wrong(module):
        def run(x, indices, weights):
            out = module(x, indices, weights)
            if place == "forward":
                return out * 1.2
            out.register_hook(lambda gradient: gradient * 1.2)
            return out

        return run

    peer = peers.PEERS["other"]._replace(build=lambda experts, shape: wrong(experts))
    monkeypatch.setitem(peers.PEERS, "other", peer)
    with pytest.raises(Inaccurate, match="block/tiny/uniform/other: relative error of"):
        peers.measure_here("other", TINY)
    assert len(here) == said


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


def test_what_a_stopped_child_had_so_far_is_kept_with_the_reason():
    so_far = json.dumps({"so_far": {"row": {"forward_ms": 1.5}}})
    code = f'say({so_far!r}); say(\'{{"stage": "first call"}}\'); time.sleep(60)'
    found = {"row": {"forward_ms": 1.5}}
    assert watched(code, first_call=0.5) == found | {"reason": "first call not finished in 0.5 s"}
    code = f"say({so_far!r}); sys.exit(3)"
    assert watched(code) == found | {"reason": "start failed with exit status 3"}
    assert watched(f"say({so_far!r}); say('{{\"row\": 2}}')") == {"row": 2}


def test_a_stage_that_is_entered_again_has_what_it_left():
    stages = "".join(f'say(\'{{"stage": "{name}"}}\'); time.sleep(0.8); ' for name in ("first call", "measurement"))
    found = watched(f"{stages * 3}say('{{}}')", first_call=2, measurement=20)
    assert found == {"reason": "first call not finished in 2 s"}


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
