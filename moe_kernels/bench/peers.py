"""Third-party MoE experts in the block of Qwen3, measured in a process that can be killed.

    python -m moe_kernels.bench.peers --peer sonicmoe --shape qwen3-30b --cap 240

Peers tune themselves during their first call, some of them for many minutes, and that can't be interrupted from within.
So a peer runs in a process of its own, which says where it is; one that stays too long is killed and its rows say so.
The forward is tuned and measured before the backward, so that a peer which has no time for that has a row all the same.

liger: what LigerExperts of liger-kernel calls (Triton, tuned anew in every process).
sonicmoe: SonicMoE's functional for a given routing (CuTe DSL). It compiles 20 to 80 configurations of a product, 2.5 s
each, in QUACK_COMPILE_WORKERS processes (1 means in none but its own, which takes minutes more) and keeps them on disk;
with QUACK_CACHE_AUTOTUNING=1 its choice too. ``environment`` sets both where the user has not; QUACK_CACHE_DIR says
where, and a second run with the same directory begins where the first was stopped.
sonic-moe 0.1.2.post1 declares torch <= 2.9.1, so it is installed without its dependencies, beside quack-kernels 0.3.11,
nvidia-cutlass-dsl and nvidia-cutlass-dsl-libs-base 4.4.2, apache-tvm-ffi and torch-c-dlpack-ext, with
nvidia_cutlass_dsl/python_packages on PYTHONPATH.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.bench.results import ROOT
from moe_kernels.bench.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from moe_kernels.bench.block import Case
    from moe_kernels.bench.layer import Layer

#: Before and after the first call: imports and the layer; the check against fp32 and the measurement.
_LIMITS_S = {"start": 180, "measurement": 120}
_FIRST_CALL = "first call"
#: What a line for the parent begins with; peers print lines of their own.
_MARK = "moe_kernels.bench.peers: "


# The peers: experts(rows_TD, indices_TK, weights_TK) -> out_TD on the parameters of a Transformers experts module


def _liger(experts: nn.Module, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.ops import LigerFusedMoEFunction

    def run(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        parameters = experts.gate_up_proj, experts.down_proj
        return LigerFusedMoEFunction.apply(x_TD, *parameters, indices_TK.int(), weights_TK)

    return run


def _sonicmoe(experts: nn.Module, shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    device = experts.gate_up_proj.device
    token_of_slot = torch.arange(shape.T, device=device, dtype=torch.int32).repeat_interleave(shape.K)

    def run(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD, _ = moe_general_routing_inputs(
            x_TD,
            weights_TK.reshape(-1),
            token_of_slot,
            indices_TK.reshape(-1).int(),
            experts.gate_up_proj.permute(1, 2, 0),  # [2I, D, E], a view
            None,
            experts.down_proj.permute(1, 2, 0),  # [D, I, E], a view
            None,
            E=shape.E,
            stream_id=None,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,  # gate rows, then up rows, as Transformers keeps them
        )
        return out_TD

    return run


class Peer(NamedTuple):
    build: Callable[[nn.Module, Shape], Callable[[Tensor, Tensor, Tensor], Tensor]]
    modules: tuple[str, ...]  # that have to be importable
    capabilities: tuple[int, ...]  # major compute capabilities it has kernels for
    cap_s: int  # default limit of the first call


PEERS = {
    "liger": Peer(_liger, ("liger_kernel", "triton"), (8, 9, 10, 12), 150),
    "sonicmoe": Peer(_sonicmoe, ("sonicmoe", "quack", "cutlass", "tvm_ffi"), (9, 10), 240),
}


def available() -> dict[str, str | None]:
    """Each peer with None, or the reason why it can't run here. Imports none of them."""
    return {name: _why_not(peer) for name, peer in PEERS.items()}


def _why_not(peer: Peer) -> str | None:
    missing = [name for name in peer.modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: no module named {', '.join(missing)}"
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major not in peer.capabilities:
        return f"has no kernels for compute capability {major}.{minor}"
    return None


def peer_block(name: str, shape: Shape, block: nn.Module) -> Callable[[Tensor], Tensor]:
    """A block of Transformers' Qwen3-MoE, same parameters and stock router, with the experts of a peer.

    Args:
        name: one of ``PEERS``.
        shape: of the block; every call has its T tokens.
        block: a ``Qwen3MoeSparseMoeBlock``.

    Returns:
        x [..., D] of T tokens -> [..., D], differentiable in x and in the block's parameters. Its first call may take
        minutes: :func:`measure_peer`.
    """
    run = _peer(name, "peer_block").build(block.experts, shape)

    def forward(x: Tensor) -> Tensor:
        rows_TD = x.reshape(-1, shape.D)
        _, weights_TK, indices_TK = block.gate(rows_TD)
        return run(rows_TD, indices_TK, weights_TK).view(x.shape)

    return forward


def _peer(name: str, caller: str) -> Peer:
    if name not in PEERS:
        raise ValueError(f"{caller}: name must be one of {', '.join(PEERS)}, got {name!r}")
    return PEERS[name]


# The parent


def measure_peer(name: str, shape: Shape, cap_s: float | None = None) -> dict:
    """The rows of one peer for ``block.json``, or {"reason": why there are none}; both if only the forward was in time.

    Args:
        name: one of ``PEERS``.
        shape: one of ``SHAPES``.
        cap_s: seconds the first call (forward and backward, with all tuning) may take; default: the peer's own.
    """
    peer = _peer(name, "measure_peer")
    if (reason := _why_not(peer)) is not None:
        return {"reason": reason}
    command = [sys.executable, "-m", "moe_kernels.bench.peers", "--here", f"--peer={name}", f"--shape={shape.name}"]
    limits = _LIMITS_S | {_FIRST_CALL: peer.cap_s if cap_s is None else cap_s}
    return watch(command, limits, "start", environment())


def environment() -> dict[str, str]:
    """This process's, and what SonicMoE should find where the user has not set it."""
    # One turns its compilation ahead off. More are started one after the other, anew for each product: with 14 on 16
    # cores 90 s went by until the last was ready (6.4 s each), and 8 s for the 22 configurations.
    workers = max(2, min((os.cpu_count() or 1) - 2, 4))
    return {"QUACK_COMPILE_WORKERS": str(workers), "QUACK_CACHE_AUTOTUNING": "1"} | os.environ


def watch(command: Sequence[str], limits: Mapping[str, float], stage: str, environment: Mapping[str, str]) -> dict:
    """Run a command that tells its stages, kill it and all it started when one takes too long; its result or a reason.

    Args:
        command: says ``{"stage": name}``, perhaps ``{"so_far": part of the result}``, and at last its result, with
            :func:`say`.
        limits: seconds allowed for each stage, all the times together that the command is in it.
        stage: the one it starts in.
        environment: of the command.

    Returns:
        The result, or {"reason": why there is none} beside what the command had so far.
    """
    left = dict(limits)
    printed: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        result, so_far, reason = None, {}, None
        entered = time.monotonic()
        try:
            while (line := lines.get(timeout=max(0, entered + left[stage] - time.monotonic()))) is not None:
                before, mark, text = line.partition(_MARK)
                message = json.loads(text) if mark else {}
                if "stage" in message:
                    now = time.monotonic()
                    left[stage] -= now - entered
                    stage, entered = message["stage"], now
                elif "so_far" in message:
                    so_far = message["so_far"]
                elif mark:
                    result = message
                if before.strip():
                    printed.append(before)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        except queue.Empty:
            result, reason = None, f"{stage} not finished in {limits[stage]:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # its workers may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        errors.seek(0)
        reason = reason or f"{stage} failed with exit status {code}"
        return result or so_far | {"reason": reason + _said("stderr", errors) + _said("stdout", printed)}


@contextlib.contextmanager
def empty_caches() -> Iterator[dict[str, str]]:
    """This process's environment, but for compiler caches that nobody has filled."""
    with tempfile.TemporaryDirectory() as empty:
        yield os.environ | {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}


#: How much of what a peer printed its reason quotes.
_LAST_LINES, _LINE_LENGTH = 3, 200


def _said(stream: str, lines: Iterable[str]) -> str:
    """The last lines of a stream, to follow a reason."""
    last = collections.deque(filter(None, map(str.strip, lines)), maxlen=_LAST_LINES)
    return f"; {stream}: {' | '.join(line[:_LINE_LENGTH] for line in last)}" if last else ""


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


# The child


def say(message: dict) -> None:
    print(f"{_MARK}{json.dumps(message)}", flush=True)


def measure_here(name: str, shape: Shape) -> dict[str, dict]:
    """The rows of a peer, measured in this process: the first forward, how it stands to ours, and the same of a step.

    What is known after the forward is said at once: the backward may take too long.
    """
    from moe_kernels.bench.block import FILE, Case, run
    from moe_kernels.bench.layer import SANE, gradients
    from moe_kernels.bench.session import Session

    session, case = Session(), Case("block", shape, "uniform", name)
    layer = session.layer(shape)
    which = case.what, case.routing
    blocks = {each: layer.forward(*which, each) for each in (name, "moe_kernels")}
    out, forward_s = _first(lambda: blocks[name]().detach())
    layer.check(case.name, *which, [out], SANE)
    over = {"first_call_s": forward_s} | _over_ours("forward", case, blocks)
    session.record(FILE, case.name, over)
    say({"so_far": session.rows[FILE]})
    _, step_s = _first(lambda: gradients(blocks[name], layer.leaves(*which), layer.d_out))
    over["first_call_s"] = round(forward_s + step_s, 1)
    _, row = run(session, case)
    steps = {each: functools.partial(_step, layer, case, block) for each, block in blocks.items()}
    session.record(FILE, case.name, over | _over_ours("step", case, steps) | row)  # its times are those of any block
    return session.rows[FILE]


def _first(run: Callable[[], object]) -> tuple[object, float]:
    """What a first call returns, and the seconds it takes; from here on it counts as measurement again."""
    say({"stage": _FIRST_CALL})
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    say({"stage": "measurement"})
    return result, round(seconds, 1)


def _step(layer: "Layer", case: "Case", forward: Callable[[], Tensor]) -> None:
    forward().backward(layer.d_out)
    for leaf in layer.leaves(case.what, case.routing):
        leaf.grad = None


def _over_ours(what: str, case: "Case", runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The peer's time over ours, both run in turn: two loops one after the other differ by more in clock and heat."""
    from moe_kernels.bench.measure import medians_in_turn_ms

    times = medians_in_turn_ms(runs)
    ratio = times[case.implementation] / times["moe_kernels"]
    return {f"{what}_ms": times[case.implementation], f"{what}_over_moe_kernels": ratio}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b", help="default: qwen3-30b")
    parser.add_argument("--cap", type=float, metavar="S", help="seconds that the first call may take")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit")
    args = parser.parse_args()
    if args.here:
        say(measure_here(args.peer, SHAPES[args.shape]))
        return 0
    result = measure_peer(args.peer, SHAPES[args.shape], args.cap)
    print(json.dumps(result))
    return "reason" in result


if __name__ == "__main__":
    sys.exit(main())
