"""Triton kernels compiled ahead of their launch, many at once, each in a process of its own that can be killed.

Compiling is most of an offline tuner's time. ``recorded`` runs a call up to its launch and takes down what Triton would
compile for it; ``compiled`` makes that in processes that need no GPU and leave it in Triton's cache on disk, where the
launch finds it.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

#: Seconds one kernel may take; those that spill everything take minutes.
CAP_S = 60


class Source(NamedTuple):
    """A kernel and all that its machine code depends on, in Triton's own words."""

    module: str
    kernel: str
    specialization: str


class Compiled(NamedTuple):
    shared: int  # bytes of shared memory a program needs
    hash: str  # of its place in Triton's cache


class _Target:
    """What compiling asks of a driver, so that none is loaded."""

    def __init__(self, arch: int):
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def recorded(call: Callable[[], object]) -> list[Source]:
    """The kernels that ``call`` would compile and launch; it launches none of these and returns no results."""
    sources = []

    def record(*, fn, compile, **_) -> bool:
        sources.append(Source(fn.module, fn.name, compile["specialization_data"]))
        return True  # neither compiled nor launched

    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, record
    try:
        call()
    finally:
        knobs.jit_cache_hook = before
    return sources


def compiled(
    sources: Sequence[Source], capability: tuple[int, int], *, workers: int | None = None, cap_s: float = CAP_S
) -> Iterator[tuple[Source, Compiled | str]]:
    """Compile all: each with its result, or with the reason why there is none, as they get done.

    Args:
        sources: from ``recorded``.
        capability: of the GPU they are for.
        workers: processes at a time; by default one for each processor.
        cap_s: seconds each may take.
    """
    workers = workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *{source.module for source in sources}])
    arch = capability[0] * 10 + capability[1]
    todo = list(reversed(sources))
    running: dict[Connection, tuple[Source, multiprocessing.Process, float]] = {}
    try:
        while todo or running:
            while todo and len(running) < workers:
                source = todo.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_compile, args=(source, arch, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = source, process, time.monotonic() + cap_s
            first_deadline = min(deadline for _, _, deadline in running.values())
            wait(running, timeout=max(0.0, first_deadline - time.monotonic()))
            for receiver, (source, process, deadline) in list(running.items()):
                if receiver.poll():
                    try:
                        result = receiver.recv()
                    except EOFError:
                        result = "the compiler crashed"
                elif time.monotonic() >= deadline:
                    result = f"not compiled in {cap_s:g} s"
                else:
                    continue
                del running[receiver]
                _end(receiver, process)
                yield source, result
    finally:
        for receiver, (_, process, _) in running.items():
            _end(receiver, process)


def _end(receiver: Connection, process: multiprocessing.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the assembler it started, too
    process.kill()  # had it no group yet
    process.join()
    receiver.close()


def _compile(source: Source, arch: int, sender: Connection) -> None:
    os.setpgrp()
    with open(os.devnull, "w") as nowhere:  # the compiler prints its whole input when it gives up
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    triton.runtime.driver.set_active(_Target(arch))
    try:
        kernel = getattr(importlib.import_module(source.module), source.kernel).preload(source.specialization)
        sender.send(Compiled(kernel.metadata.shared, kernel.hash))
    except Exception as error:
        # A candidate that the compiler refuses is an answer; the kind says which of its passes it was.
        lines = str(error).strip().splitlines() or [""]
        sender.send(f"{type(error).__name__}: {lines[0]}")
