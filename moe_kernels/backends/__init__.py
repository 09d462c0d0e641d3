"""The one table that picks a backend for an op.

    reference   plain torch, any device, any float dtype: the definition of correct
    triton      GPU kernels for Ampere, Hopper and Blackwell
    cuda        CUDA C++ kernels of the extension module ``moe_kernels._C``

``resolve`` takes the first backend of ``order(op, problem)`` that implements the op and whose ``supports`` has nothing
against the problem. ``MOE_KERNELS_BACKEND=<name>`` or :func:`use_backend` force one; a forced backend that can't run
raises.
This file holds the only mutable state of the library: which backend is forced, process-wide, because autograd runs
the backward in threads of its own.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch

ORDER = ("cuda", "triton", "reference")

#: Where another order is the faster one: by op and a trait of the problem.
ORDER_WITH = {
    # DeepSeek-V3's router on an H200: 15.8 µs in Triton, 17.1 in CUDA C++.
    ("topk_route", "groups"): ("triton", "cuda", "reference"),
}

OPS = (
    "routing_plan",
    "topk_route",
    "topk_route_bwd",
    "permute",
    "unpermute",
    "gate_up",
    "grouped_gemm",
    "d_activation",
    "grouped_wgrad",
    "combine",
    "decode_experts",
)

#: Which backend has which op; the module is ``backends/<backend>/<op>.py`` (a ``_bwd`` is found beside its forward).
IMPLEMENTS = {
    "cuda": frozenset(OPS),
    "triton": frozenset(OPS) - {"decode_experts"},
    "reference": frozenset(OPS),
}


class Problem(NamedTuple):
    """What the choice of a backend may depend on.

    ``dtype`` is None where the op has no floating data; ``dims`` are the widths that kernels want aligned (D, I).
    ``block_m`` is the plan's rows a tile, 0 for an op without row tiles. ``traits`` say what is asked for beyond the
    plainest call: "bias", "activation geglu", "gather none", "float32 result", "transposed weights".
    """

    device: torch.device
    dtype: torch.dtype | None
    dims: tuple[int, ...]
    block_m: int = 0
    traits: tuple[str, ...] = ()


class Choice(NamedTuple):
    backend: str
    function: Callable
    passed_over: tuple[tuple[str, str], ...]  # (backend, why not), in the order they were asked


DECLINED = "the forced backend can't run on"

_forced: str | None = None


def forced_backend() -> str | None:
    """The backend that ``use_backend`` or the environment forces, or None."""
    name = _forced or os.environ.get("MOE_KERNELS_BACKEND") or None
    if name is not None and name not in ORDER:
        raise ValueError(f"MOE_KERNELS_BACKEND must be one of {', '.join(ORDER)}, got {name!r}")
    return name


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Force a backend for every op inside a block, process-wide: ``with use_backend("reference"):``.

    Forcing "cuda" takes it for the ops it implements and picks freely for the others. An op that the forced backend
    implements but can't run on its inputs raises RuntimeError with the reason. None lifts an outer ``use_backend``.
    """
    if name is not None and name not in ORDER:
        raise ValueError(f"use_backend: name must be one of {', '.join(ORDER)} or None, got {name!r}")
    return _forcing(name)


@contextmanager
def _forcing(name: str | None) -> Iterator[None]:
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def why_not(backend: str, op: str, problem: Problem) -> str | None:
    """The reason why ``backend`` can't run ``op`` on this problem, or None when it can."""
    if op not in IMPLEMENTS[backend]:
        return f"{backend} does not implement {op}"
    return importlib.import_module(f"moe_kernels.backends.{backend}").supports(op, problem)


def order(op: str, problem: Problem) -> tuple[str, ...]:
    """The backends in the order in which ``op`` asks them."""
    return next((ORDER_WITH[op, trait] for trait in problem.traits if (op, trait) in ORDER_WITH), ORDER)


def is_first(backend: str, op: str, problem: Problem) -> bool:
    """Whether ``backend`` runs ``op`` here, unless another one is forced: for what has a slower way to do the same."""
    return forced_backend() in (None, backend) and _can(backend, op, problem)


@functools.lru_cache(maxsize=4096)
def _can(backend: str, op: str, problem: Problem) -> bool:
    return why_not(backend, op, problem) is None


def resolve(op: str, problem: Problem) -> Choice:
    """Pick the backend of ``op`` for ``problem``; RuntimeError when a forced one can't run it."""
    return _resolve(op, problem, forced_backend())


@functools.lru_cache(maxsize=4096)
def _resolve(op: str, problem: Problem, forced: str | None) -> Choice:
    candidates = (forced,) if forced is not None and op in IMPLEMENTS[forced] else order(op, problem)
    passed_over = []
    for backend in candidates:
        reason = why_not(backend, op, problem)
        if reason is None:
            module = importlib.import_module(f"moe_kernels.backends.{backend}.{op.removesuffix('_bwd')}")
            return Choice(backend, getattr(module, op), tuple(passed_over))
        passed_over.append((backend, reason))
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed_over)
    raise RuntimeError(f"{op}: {DECLINED} {_describe(problem)} ({reasons})")


def _describe(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.") if problem.dtype else "no floating data"
    return ", ".join([str(problem.device), dtype, f"widths {list(problem.dims)}", *problem.traits])
