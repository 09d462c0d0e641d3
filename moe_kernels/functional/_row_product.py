"""Y and dX: a product over all rows and its sum per token, a few columns at a time where the rows are large."""

import torch
from torch import Tensor

#: Y and dX rows may take as much memory as the gradient of w_gate_up would, which never lives beside them; where it is
#: added to ``.grad``, as much as the rows they are made of. Or this much if that is less. Beyond it they are made and
#: summed fewer columns at a time.
_ROW_BUFFER_BYTES = 64 * 2**20
_CHUNK_COLUMNS = 256  # chunks are multiples of this: a narrower product would waste the widest tiles


def row_product_and_sum(
    a_RC, w, bias_EN, weights_TK, plan, inner, accumulate_grad, residual_TD=None, *, trans_w
) -> Tensor:
    """residual + sum over k of s * (a . W) per token, [T, D]; ``inner`` is N, the width of H."""
    width = w.shape[1 if trans_w else 2]
    out_TD = a_RC.new_empty(plan.positions_TK.shape[0], width)
    step = _chunk_columns(a_RC, width, None if accumulate_grad else plan.num_experts * inner * width)
    for start in range(0, width, step):
        columns = start, min(step, width - start)
        y_Rn = torch.ops.moe_kernels.grouped_gemm(
            a_RC,
            _columns(w, *columns, dim=1 if trans_w else 2),
            _columns(bias_EN, *columns),
            plan.offsets_E1,
            plan.tiles_2M,
            plan.block_m,
            trans_w,
        )
        out_Tn, residual_Tn = _columns(out_TD, *columns), _columns(residual_TD, *columns)
        torch.ops.moe_kernels.combine(out_Tn, y_Rn, plan.positions_TK, weights_TK, residual_Tn)
        del y_Rn  # before the next columns get memory of their own
    return out_TD


def _columns(tensor: Tensor | None, start: int, length: int, dim: int = 1) -> Tensor | None:
    """Columns of a tensor, or the tensor itself where they are all: a view takes the host 2 µs."""
    return tensor if tensor is None or tensor.shape[dim] == length else tensor.narrow(dim, start, length)


def _chunk_columns(a_RC: Tensor, width: int, allowed: int | None) -> int:
    """How many of the ``width`` columns of a row buffer to make at a time.

    Args:
        allowed: elements that the buffer may have in any case; None: as many as ``a_RC``.
    """
    if torch.compiler.is_compiling():  # without a look at T: a comparison of a symbolic one would be a guard
        chunks = 1 if allowed is not None else -(-width // a_RC.shape[1])
    else:
        allowed = a_RC.numel() if allowed is None else allowed
        chunks = -(-a_RC.shape[0] * width // max(_ROW_BUFFER_BYTES // a_RC.element_size(), allowed))
    if chunks <= 1:
        return width
    return min(width, -(-width // (chunks * _CHUNK_COLUMNS)) * _CHUNK_COLUMNS)
