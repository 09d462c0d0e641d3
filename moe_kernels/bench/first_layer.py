"""The first forward, and the first step, of a layer of our own modules in a fresh process: two rows of model.json.

    python -m moe_kernels.bench.first_layer --what step

Compiler caches are empty, and nothing is imported that a user of the layer would not import: Triton's own import is
part of a first step that needs Triton. So what it compiles is counted by what it leaves in its cache, not by asking it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_kernels.bench.peers import empty_caches, say, watch
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES, Shape
from moe_kernels.modules import MoE

WHAT = ("forward", "step")
_LIMIT_S = 120


def measure(what: str, shape: Shape, started: float, device: str = "cuda") -> dict[str, dict]:
    """The row of this process, whose imports are done and which has not called anything yet.

    Args:
        what: "forward", as in training, or "step": with its backward.
        started: ``time.time()`` when the process was.
    """
    imported = time.time()
    moe = MoE(shape.D, shape.I, shape.E, shape.K, device=device, dtype=torch.bfloat16)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(shape.T, shape.D, device=device, dtype=torch.bfloat16, requires_grad=True)
    d_out = torch.randn_like(x) if what == "step" else None
    torch.cuda.synchronize()
    built = time.time()
    out = _call(moe, x, d_out)
    torch.cuda.synchronize()
    done = time.time()
    compiled = sorted(path.stem for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
    name = f"layer/{shape.name}/first_{what}"
    _check(name, moe, x, d_out, out)
    row: dict[str, float | str] = {
        "import_s": imported - started,
        "build_s": built - imported,
        "first_step_s": done - imported,
        "compilations_first": len(compiled),
    }
    if compiled:
        row["compiled_first"] = " ".join(compiled)
    return {name: row | _backends(lambda: _call(moe, x, d_out))}


def _call(moe: MoE, x: Tensor, d_out: Tensor | None) -> Tensor:
    out = moe(x)
    if d_out is not None:
        out.backward(d_out)
    return out.detach()


def _check(name: str, moe: MoE, x: Tensor, d_out: Tensor | None, out: Tensor) -> None:
    """The output and the gradients of the experts' weights against fp32, on the experts that the router chose."""
    from moe_kernels import use_backend
    from moe_kernels.bench.layer import Inaccurate, relative_l2
    from moe_kernels.bench.model import MOST_GRADIENT_DIFFERENCE
    from moe_kernels.functional import moe_experts, routing_plan

    with torch.no_grad():
        weights, indices, _ = moe.router(x)
    parameters = moe.experts.gate_up_proj, moe.experts.down_proj
    exact = [parameter.detach().float().requires_grad_() for parameter in parameters]
    with use_backend("reference"):
        truth = moe_experts(x.detach().float(), weights.float(), routing_plan(indices, moe.experts.num_experts), *exact)
        pairs = {"out": (out, truth.detach())}
        if d_out is not None:
            gradients = torch.autograd.grad(truth, exact, d_out.float())
            found = [parameter.grad for parameter in parameters]
            pairs |= zip(("dw_gate_up", "dw_down"), zip(found, gradients, strict=True), strict=True)
    for which, (value, true) in pairs.items():
        if not (error := relative_l2(value, true)) < MOST_GRADIENT_DIFFERENCE:  # NaN too
            raise Inaccurate(f"{name}: {which} has a relative error of {error:.1e}")


def _backends(call: Callable[[], object]) -> dict[str, str]:
    """By backend the ops that it runs of a call: the first one again."""
    from moe_kernels.bench.ops import Choices

    ran: dict[str, set[str]] = {}
    with torch.autograd.set_multithreading_enabled(False), Choices() as choices:  # the backward in this thread
        call()
    for op, backend in choices.made:
        ran.setdefault(backend, set()).add(op)
    return {f"on_{backend}": " ".join(sorted(found)) for backend, found in ran.items()}


def measured(what: str) -> dict[str, dict]:
    """The row of ``what`` by a process of its own, or {"reason": why there is none}."""
    command = [sys.executable, "-m", "moe_kernels.bench.first_layer", "--what", what, f"--here={time.time()}"]
    with empty_caches() as environment:
        return watch(command, {what: _LIMIT_S}, what, environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=WHAT, required=True)
    parser.add_argument("--here", type=float, metavar="S", help="in this process, which was started at time.time() S")
    args = parser.parse_args()
    if args.here is not None:  # no question to the GPU before the clock runs
        say(measure(args.what, SHAPES[DEFAULT_SHAPES[0]], args.here))
        return 0
    if not torch.cuda.is_available():
        sys.exit("moe_kernels.bench.first_layer: needs a CUDA GPU")
    row = measured(args.what)
    print(json.dumps(row))
    return "reason" in row


if __name__ == "__main__":
    sys.exit(main())
