"""permute: out[r] = s[slot] * x[slot // K] with slot = slots[r]; rows past offsets[E] are zero.

x [T, D] -> out [R, D]. A copy: R*D elements read and written, int64 row offsets.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import Launch, cdiv, launch, rows_contiguous

_ELEMENTS = 2048


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["weights_ptr"])
def permute_kernel(
    out_ptr,
    x_ptr,
    weights_ptr,
    offsets_ptr,
    slots_ptr,
    num_experts,
    R,
    D,
    stride_x,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    kept = o_r < tl.load(offsets_ptr + num_experts)
    m_d = (o_d < D)[None, :]
    slots = tl.load(slots_ptr + o_r, mask=kept, other=0)
    tokens = (slots // TOP_K).to(tl.int64)
    row = tl.load(x_ptr + tokens[:, None] * stride_x + o_d[None, :], mask=kept[:, None] & m_d, other=0.0)
    if HAS_WEIGHTS:
        s = tl.load(weights_ptr + slots, mask=kept, other=0.0).to(tl.float32)
        row = row.to(tl.float32) * s[:, None]
    p_out = out_ptr + o_r[:, None] * D + o_d[None, :]
    tl.store(p_out, row.to(out_ptr.dtype.element_ty), mask=(o_r < R)[:, None] & m_d)


def permute(
    x_TD: Tensor, weights_TK: Tensor | None, offsets_E1: Tensor, slots_R: Tensor, positions_TK: Tensor
) -> Tensor:
    rows, width = slots_R.shape[0], x_TD.shape[1]
    out_RD = x_TD.new_empty(rows, width)
    if rows == 0 or width == 0:
        return out_RD
    x_TD = rows_contiguous(x_TD)
    block_d = min(512, triton.next_power_of_2(width))
    block_r = max(1, _ELEMENTS // block_d)
    launch(
        x_TD.device,
        Launch(
            permute_kernel,
            (cdiv(rows, block_r), cdiv(width, block_d)),
            {
                "out_ptr": out_RD,
                "x_ptr": x_TD,
                "weights_ptr": out_RD if weights_TK is None else weights_TK.contiguous(),
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "num_experts": offsets_E1.shape[0] - 1,
                "R": rows,
                "D": width,
                "stride_x": x_TD.stride(0),
            },
            {
                "TOP_K": positions_TK.shape[1],
                "HAS_WEIGHTS": weights_TK is not None,
                "BLOCK_R": block_r,
                "BLOCK_D": block_d,
            },
            4,
            1,
        ),
    )
    return out_RD
