from torch import Tensor

from moe_kernels.backends.reference.combine import combine
from moe_kernels.backends.reference.gate_up import gate_up
from moe_kernels.backends.reference.grouped_gemm import grouped_gemm
from moe_kernels.backends.reference.routing_plan import routing_plan

_BLOCK_M = 16  # of a tile map that the reference ops don't look at


def decode_experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    w_END: Tensor,
    bias_EN: Tensor | None,
    w_EDI: Tensor,
    bias_ED: Tensor | None,
    activation: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    offsets_E1, slots_R, positions_TK, tiles_2M = routing_plan(indices_TK, w_END.shape[0], _BLOCK_M)
    options = alpha, limit, interleaved
    plan = offsets_E1, slots_R, tiles_2M, _BLOCK_M
    _, a_RI = gate_up(x_TD, w_END, bias_EN, *plan, indices_TK.shape[1], activation, False, True, *options)
    y_RD = grouped_gemm(a_RI, w_EDI, bias_ED, offsets_E1, tiles_2M, _BLOCK_M, True)
    out_TD = x_TD.new_empty(x_TD.shape)
    combine(out_TD, y_RD, positions_TK, weights_TK, None)
    return out_TD
