"""gate_up: launches ``csrc/gate_up.cu``, on copies of rows that can't be read 16 bytes at a time."""

from torch import Tensor

from moe_kernels.backends.cuda._extension import (
    activation_arguments,
    address,
    aligned_rows,
    is_gated,
    launch_sm90,
    plan_of,
    weights_of,
)


def gate_up(
    x_TD: Tensor,
    w_END: Tensor,
    bias_EN: Tensor | None,
    offsets_E1: Tensor,
    slots_R: Tensor,
    tiles_2M: Tensor,
    block_m: int,
    top_k: int,
    activation: str,
    store_h: bool,
    store_a: bool,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    rows, n = slots_R.shape[0], w_END.shape[1]
    inner = n // 2 if is_gated(activation) else n
    h_RN = x_TD.new_empty(rows if store_h else 0, n)
    a_RI = x_TD.new_empty(rows if store_a else 0, inner)
    if rows == 0:
        return h_RN, a_RI
    across = w_END.stride(2) != 1
    x_TD, w = aligned_rows(x_TD), aligned_rows(w_END.mT if across else w_END)
    bias_EN = None if bias_EN is None else aligned_rows(bias_EN.contiguous())
    launch_sm90(
        "gate_up",
        x_TD.device,
        h=address(h_RN) if store_h else 0,
        a=address(a_RI) if store_a else 0,
        x=address(x_TD),
        x_stride=x_TD.stride(0),
        w=weights_of(w),
        across=across,
        bias=address(bias_EN),
        inner=inner,
        reduced=x_TD.shape[1],
        **activation_arguments(activation, alpha, limit, interleaved),
        plan=plan_of(offsets_E1, slots_R, tiles_2M, rows, top_k),
    )
    return h_RN, a_RI
