"""gate_up: the first expert product with its gather and activation.

    H[r] = x[token(r)] . W[e]^T (+ bias[e])     pre-activation, [R, N]
    A[r] = act(H[r])                            [R, I]; gated: act(H[:, :I]) * H[:, I:], N = 2I; else N = I

e is the expert that owns sorted row r and token(r) = slots[r] // top_k. W is [E, N, D], gate rows before up rows;
``interleaved``: gate and up rows in turn, and so are the columns of H and the bias. ``alpha`` and ``limit`` are those
of the clamped activations (``_contract.py``). ``store_h`` / ``store_a`` leave out an output nobody reads; it then comes
back empty.
"""

from moe_kernels.backends import Problem
from moe_kernels.ops import _contract as c
from moe_kernels.ops._library import define
from moe_kernels.ops.routing_plan import max_tiles


def activation_width(n: int, activation: str) -> int:
    """I of a pre-activation that is ``n`` wide."""
    return n // 2 if c.is_gated(activation) else n


def traits(w, *, bias: bool = False, activation: str = "swiglu", interleaved: bool = False) -> tuple[str, ...]:
    """What is asked for beyond the plainest product with ``w``; see :class:`Problem`."""
    asked = () if activation == "swiglu" else (f"activation {activation}",)
    if bias:
        asked = ("bias", *asked)
    if interleaved:
        asked += ("interleaved gate_up",)
    return asked if w.stride(2) == 1 else (*asked, "transposed weights")


def check_plan(op, data, offsets_E1, tiles_2M, block_m, num_experts, rows):
    """The plan tensors are of one plan for ``rows`` rows: kernels trust the rows and experts that the tiles name."""
    c.check_offsets(op, offsets_E1, data)
    c.check_size(op, "offsets", offsets_E1, 0, num_experts + 1, "E + 1 with E of the weights")
    c.check_index(op, "tiles", tiles_2M, 2, "[2, M]", data)
    c.check_block_m(op, block_m)
    c.check_size(op, "tiles", tiles_2M, 1, max_tiles(rows, num_experts, block_m), f"{rows} rows by {block_m}")


def _check(x_TD, w_END, bias_EN, offsets_E1, slots_R, tiles_2M, block_m, top_k, activation, store_h, store_a, *options):
    op = "gate_up"
    c.check_activation(op, activation, *options)
    c.check_matrix(op, "x", x_TD, 2, "[T, D]")
    c.check_matrix(op, "w_gate_up", w_END, 3, "[E, 2I, D] (gated) or [E, I, D]")
    c.check_like(op, "w_gate_up", w_END, x_TD, "x")
    c.check_size(op, "w_gate_up", w_END, 2, x_TD.shape[1], "D of x")
    if c.is_gated(activation) and w_END.shape[1] % 2:
        c.fail(op, "w_gate_up", w_END, f"of an even size in dimension 1: {activation} is gated")
    if bias_EN is not None:
        c.check_like(op, "bias_gate_up", bias_EN, x_TD, "x")
        if bias_EN.shape != w_END.shape[:2]:
            c.fail(op, "bias_gate_up", bias_EN, f"of shape {list(w_END.shape[:2])}")
    check_plan(op, x_TD, offsets_E1, tiles_2M, block_m, w_END.shape[0], slots_R.shape[0])
    c.check_index(op, "slots", slots_R, 1, "[R]", x_TD)
    c.check_size(op, "slots", slots_R, 0, x_TD.shape[0] * top_k, "R = T * top_k")
    if not (store_h or store_a):
        c.fail(op, "store_h, store_a", (store_h, store_a), "true for at least one output")


def _fake(x_TD, w_END, bias_EN, offsets_E1, slots_R, tiles_2M, block_m, top_k, activation, store_h, store_a, *_):
    rows, n = slots_R.shape[0], w_END.shape[1]
    return (
        x_TD.new_empty(rows, n) if store_h else x_TD.new_empty(0, n),
        x_TD.new_empty(rows if store_a else 0, activation_width(n, activation)),
    )


def _problem(
    x, w, bias, offsets, slots, tiles, block_m, top_k, activation, h, a, alpha=None, limit=None, interleaved=False
):
    asked = traits(w, bias=bias is not None, activation=activation, interleaved=interleaved)
    return Problem(x.device, x.dtype, (x.shape[1], activation_width(w.shape[1], activation)), block_m, asked)


define(
    "gate_up(Tensor x, Tensor w_gate_up, Tensor? bias_gate_up, Tensor offsets, Tensor slots, Tensor tiles, "
    f"int block_m, int top_k, str activation, bool store_h, bool store_a, {c.ACTIVATION_OPTIONS}) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    problem=_problem,
)
