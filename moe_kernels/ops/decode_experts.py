"""decode_experts: the experts' forward for few tokens, without a routing plan and without a gradient.

    out[t] = sum over k of weights[t, k] * (act(x[t] . W_gate_up[e]^T (+ bias)) . W_down[e]^T (+ bias))

with e = indices[t, k]. The same function as routing_plan, gate_up, grouped_gemm and combine in a row, for a decode step
or a short batch: R = T * K at most ``MAX_ROWS``. Indices outside 0..E-1 mean "no expert". ``alpha``, ``limit`` and
``interleaved`` as in gate_up.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define
from moe_kernels.ops.gate_up import activation_width, traits

MAX_ROWS = 2048


def problem(
    x_TD,
    indices_TK,
    weights_TK,
    w_END,
    bias_EN,
    w_EDI,
    bias_ED,
    activation,
    alpha=None,
    limit=None,
    interleaved=False,
):
    asked = traits(w_END, bias=bias_EN is not None, activation=activation, interleaved=interleaved)
    transposed = ("transposed weights",) if w_EDI.stride(2) != 1 else ()
    return Problem(
        x_TD.device,
        x_TD.dtype,
        (x_TD.shape[1], activation_width(w_END.shape[1], activation)),
        traits=asked + transposed,
    )


def _check(x_TD, indices_TK, weights_TK, w_END, bias_EN, w_EDI, bias_ED, activation, *options):
    op = "decode_experts"
    c.check_activation(op, activation, *options)
    c.check_matrix(op, "x", x_TD, 2, "[T, D]")
    if indices_TK.dtype not in c.INTEGERS or indices_TK.dim() != 2:
        c.fail(op, "expert_indices", indices_TK, "an int64 or int32 tensor [T, K]")
    c.check_device(op, "expert_indices", indices_TK, x_TD, "x")
    c.check_size(op, "expert_indices", indices_TK, 0, x_TD.shape[0], "T of x")
    if indices_TK.numel() > MAX_ROWS:
        c.fail(op, "expert_indices", indices_TK, f"of at most {MAX_ROWS} elements")
    c.check_weights(op, weights_TK, *indices_TK.shape, x_TD, "x")
    for name, w in (("w_gate_up", w_END), ("w_down", w_EDI)):
        c.check_matrix(op, name, w, 3, "[E, rows, columns]")
        c.check_like(op, name, w, x_TD, "x")
    c.check_size(op, "w_gate_up", w_END, 2, x_TD.shape[1], "D of x")
    if c.is_gated(activation) and w_END.shape[1] % 2:
        c.fail(op, "w_gate_up", w_END, f"of an even size in dimension 1: {activation} is gated")
    expected = (w_END.shape[0], x_TD.shape[1], activation_width(w_END.shape[1], activation))
    if tuple(w_EDI.shape) != expected:
        c.fail(op, "w_down", w_EDI, f"[E, D, I] = {list(expected)} to match w_gate_up and {activation}")
    for name, bias, w in (("bias_gate_up", bias_EN, w_END), ("bias_down", bias_ED, w_EDI)):
        if bias is not None:
            c.check_like(op, name, bias, x_TD, "x")
            if bias.shape != w.shape[:2]:
                c.fail(op, name, bias, f"of shape {list(w.shape[:2])}")


define(
    "decode_experts(Tensor x, Tensor expert_indices, Tensor weights, Tensor w_gate_up, Tensor? bias_gate_up, "
    f"Tensor w_down, Tensor? bias_down, str activation, {c.ACTIVATION_OPTIONS}) -> Tensor",
    check=_check,
    fake=lambda x, *_: x.new_empty(x.shape),
    problem=problem,
)
