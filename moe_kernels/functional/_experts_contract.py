"""What moe_experts accepts, checked before anything runs: each message names the argument, what came, what is taken."""

from torch import Tensor

from moe_kernels.functional._autocast import under_autocast
from moe_kernels.functional.routing_plan import RoutingPlan
from moe_kernels.ops._contract import FLOATS, check_activation, check_device, describe, fail, is_gated

RECOMPUTE = (None, "pre_activation")


def check(x_TD, weights_TK, w_gate_up, w_down, bias_gate_up, bias_down, routing, activation, options, recompute):
    op = "moe_experts"
    check_activation(op, activation, *options)
    if recompute not in RECOMPUTE:
        fail(op, "recompute", recompute, 'None or "pre_activation"')
    has_plan = isinstance(routing, RoutingPlan)
    if not has_plan and not isinstance(routing, Tensor):
        raise TypeError(
            f"{op}: routing must be expert indices [T, K] or a RoutingPlan of them, got {describe(routing)}"
        )
    shape_TK = tuple((routing.positions_TK if has_plan else routing).shape)
    if len(shape_TK) != 2:
        fail(op, "routing", routing, "2-dimensional, [T, K]")
    named = {
        "x": x_TD,
        "routing_weights": weights_TK,
        "w_gate_up": w_gate_up,
        "w_down": w_down,
        "bias_gate_up": bias_gate_up,
        "bias_down": bias_down,
    }
    for name, tensor in named.items():
        if tensor is not None or not name.startswith("bias"):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {name} must be a tensor, got {describe(tensor)}")
            if tensor.dtype not in FLOATS:
                raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {describe(tensor)}")
            check_device(op, name, tensor, x_TD, "x")
    if x_TD.dim() != 2 or 0 in x_TD.shape[1:]:
        fail(op, "x", x_TD, "2-dimensional, [T, D], with D > 0")
    if x_TD.shape[0] != shape_TK[0]:
        fail(op, "x", x_TD, f"of {shape_TK[0]} tokens, as the routing is for")
    if tuple(weights_TK.shape) != shape_TK:
        fail(op, "routing_weights", weights_TK, f"shaped like the expert indices {list(shape_TK)}")
    if w_gate_up.dim() != 3 or 0 in w_gate_up.shape:
        fail(op, "w_gate_up", w_gate_up, "3-dimensional, [E, 2I, D] (gated) or [E, I, D], without a size of 0")
    if has_plan and w_gate_up.shape[0] != routing.num_experts:
        fail(op, "w_gate_up", w_gate_up, f"of {routing.num_experts} experts, as the plan is for")
    inner = w_gate_up.shape[1] // (2 if is_gated(activation) else 1)
    if tuple(w_down.shape) != (w_gate_up.shape[0], w_gate_up.shape[2], inner):
        accepted = f"[E, D, I] = {[w_gate_up.shape[0], w_gate_up.shape[2], inner]} to match w_gate_up and {activation}"
        fail(op, "w_down", w_down, accepted)
    for name, weight, bias in (("bias_gate_up", w_gate_up, bias_gate_up), ("bias_down", w_down, bias_down)):
        if bias is not None and tuple(bias.shape) != tuple(weight.shape[:2]):
            fail(op, name, bias, f"of shape {list(weight.shape[:2])}")
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"{op}: {name} must be {weight.dtype} like its weight, got {describe(bias)}")
    for name, tensor in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if tensor.dtype != x_TD.dtype and not under_autocast(x_TD.device.type):
            raise TypeError(f"{op}: {name} must be {x_TD.dtype} like x (or run under autocast), got {describe(tensor)}")


def check_residual(residual_TD, x_TD) -> None:
    op = "moe_experts"
    if not isinstance(residual_TD, Tensor) or residual_TD.dtype not in FLOATS:
        raise TypeError(f"{op}: residual must be a floating-point tensor, got {describe(residual_TD)}")
    check_device(op, "residual", residual_TD, x_TD, "x")
    if residual_TD.shape != x_TD.shape:
        fail(op, "residual", residual_TD, f"shaped like x {list(x_TD.shape)}")
