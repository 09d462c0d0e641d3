"""The rows of decode.json: forward of the experts on few tokens, as in generation, where launches cost most.

Eight inputs with routings of their own take turns: a decode loop meets each layer's weights cold.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_kernels import use_backend
from moe_kernels.bench.block import why_left_out
from moe_kernels.bench.layer import SANE, SLACK, TIMES_YARDSTICK, YARDSTICK, Inaccurate, Layer, relative_l2
from moe_kernels.bench.measure import capturable, graph_us, waiting, wall_ms
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import Shape, routing
from moe_kernels.functional import moe_experts, routing_plan

FILE = "decode.json"
TOKENS = (1, 8, 64, 256)
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager", "moe_kernels")
_INPUTS = 8


@torch.no_grad()
def run(session: Session, shape: Shape, tokens: int) -> tuple[Callable[[], None], dict]:
    """Check, measure and record all implementations side by side: a call of ours for a clock on the host, its row."""
    few = shape._replace(T=tokens)
    layer = session.layer(shape)
    inputs = []
    for seed in range(_INPUTS):
        weights, indices = routing("uniform", few, layer.device, seed)
        x = torch.randn(tokens, shape.D, device=layer.device, dtype=torch.bfloat16)
        inputs.append((x, indices, weights))
    names = [name for name in IMPLEMENTATIONS if why_left_out(name, few, backward=False) is None]
    modules = {name: layer.module("experts", name) for name in names}
    _check(layer, modules, inputs)
    runs = {name: [lambda m=module, i=i: m(*i) for i in inputs] for name, module in modules.items()}
    times = wall_ms(runs)
    for name in names:
        row = {"forward_ms": times[name]}
        if (gpu_ms := _gpu_ms(runs[name], must="moe_kernels" in name)) is not None:
            row["gpu_ms"] = gpu_ms
        if name == "moe_kernels":
            row["over_best_stock"] = times[name] / min(times[s] for s in ("grouped_mm", "batched_mm") if s in times)
        row = session.record(FILE, f"decode/{shape.name}/T{tokens}/{name}", row)
    return waiting(runs["moe_kernels"][0]), row  # ours is the last


def _check(layer: Layer, modules: dict, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Ours on every input against the yardstick's error there; all others have to be sane on the first."""
    gate_up, down = layer.block.experts.gate_up_proj.float(), layer.block.experts.down_proj.float()
    for place, (x, indices, weights) in enumerate(inputs):
        with use_backend("reference"):
            truth = moe_experts(x.float(), weights.float(), routing_plan(indices, layer.shape.E), gate_up, down)
        checked = modules if place == 0 else ("moe_kernels", YARDSTICK)
        errors = {name: relative_l2(modules[name](x, indices, weights), truth) for name in checked}
        limits = dict.fromkeys(errors, SANE) | {"moe_kernels": TIMES_YARDSTICK * errors[YARDSTICK] + SLACK}
        for name, error in errors.items():
            if not error < limits[name]:  # NaN too
                label = f"decode/{layer.shape.name}/T{len(x)}/{name}"
                raise Inaccurate(f"{label}: relative error {error:.2e} on input {place}, allowed {limits[name]:.2e}")


def _gpu_ms(runs: list, must: bool) -> float | None:
    """GPU time by graph replay; None for stock that can't be captured."""
    if not must and not capturable(runs[0]):
        return None
    try:
        return graph_us(runs) / 1e3
    except RuntimeError:
        if must:
            raise
        return None
