"""grouped_wgrad: dW[e] = sum over the rows r of expert e of lhs(r)^T . rhs(r), one side gathered by token or none.

    lhs [R or T, M], rhs [R or T, N] -> dW [E, M, N] (and db [E, M] = sum of lhs), or added to a dW that is there

Tiling: a program makes one [BLOCK_M, BLOCK_N] tile of one expert's gradient and walks that expert's rows BLOCK_K at a
time. The contiguous side comes by descriptor, the gathered side by pointer loads through slots. The last, ragged step
is peeled off the loop: its box runs into the next expert's rows, and masking them in every step would pull the operand
through registers. An expert without rows takes no step and stores zeros. One program adds up a tile from first row to
last, so the sum has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.backends.triton._launch import (
    Launch,
    capability,
    cdiv,
    input_precision,
    launch,
    num_sms,
    row_descriptor,
    rows_contiguous,
)
from moe_kernels.backends.triton._tile import load_columns, tile_position
from moe_kernels.backends.triton.configs import tiles


@triton.jit
def _gathered(ptr, slots_ptr, o_r, last, columns, width, stride, TOP_K: tl.constexpr, EVEN: tl.constexpr):
    tokens = tl.load(slots_ptr + tl.minimum(o_r, last)) // TOP_K
    return load_columns(ptr + tokens.to(tl.int64)[:, None] * stride, columns, width, EVEN)


@triton.jit
def grouped_wgrad_kernel(
    lhs,  # a descriptor, or a pointer when this side is gathered
    rhs,
    dw_ptr,
    db_ptr,
    offsets_ptr,
    slots_ptr,
    num_experts,
    M,
    N,
    stride_lhs,
    stride_rhs,
    TOP_K: tl.constexpr,
    GATHER_LHS: tl.constexpr,
    GATHER_RHS: tl.constexpr,
    SUM_LHS: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # onto what dW holds
    EVEN: tl.constexpr,  # of the gathered side: its width is whole tiles
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_m_tiles = tl.cdiv(M, BLOCK_M)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    per_expert = num_m_tiles * num_n_tiles
    for tile in range(tl.program_id(0), num_experts * per_expert, tl.num_programs(0)):
        expert = tile // per_expert
        i_m, i_n = tile_position(tile % per_expert, num_m_tiles, num_n_tiles, GROUP_M)
        m = i_m * BLOCK_M
        n = i_n * BLOCK_N
        o_m = m + tl.arange(0, BLOCK_M)
        o_n = n + tl.arange(0, BLOCK_N)
        o_k = tl.arange(0, BLOCK_K)
        start = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        whole = start + (end - start) // BLOCK_K * BLOCK_K

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for row in range(start, whole, BLOCK_K):
            if GATHER_LHS:
                left = _gathered(lhs, slots_ptr, row + o_k, end - 1, o_m, M, stride_lhs, TOP_K, EVEN)
            else:
                left = lhs.load([row, m])
            if GATHER_RHS:
                right = _gathered(rhs, slots_ptr, row + o_k, end - 1, o_n, N, stride_rhs, TOP_K, EVEN)
            else:
                right = rhs.load([row, n])
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
            if SUM_LHS:
                total += tl.sum(left.to(tl.float32), axis=0)
        if whole < end:
            # Rows past the end are zeroed on both contiguous sides: another expert's rows may hold anything, NaN too.
            # A gathered side repeats the expert's last row there, times zero.
            inside = (whole + o_k < end)[:, None]
            if GATHER_LHS:
                left = _gathered(lhs, slots_ptr, whole + o_k, end - 1, o_m, M, stride_lhs, TOP_K, EVEN)
            else:
                left = lhs.load([whole, m])
            if GATHER_RHS:
                right = _gathered(rhs, slots_ptr, whole + o_k, end - 1, o_n, N, stride_rhs, TOP_K, EVEN)
            else:
                right = rhs.load([whole, n])
            left = tl.where(inside, left, 0.0)
            right = tl.where(inside, right, 0.0)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
            if SUM_LHS:
                total += tl.sum(left.to(tl.float32), axis=0)

        mask = (o_m < M)[:, None] & (o_n < N)[None, :]
        p_dw = dw_ptr + expert.to(tl.int64) * M * N + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        dw = acc.to(dw_ptr.dtype.element_ty)
        if ACCUMULATE:
            dw = (tl.load(p_dw, mask=mask).to(tl.float32) + dw.to(tl.float32)).to(dw_ptr.dtype.element_ty)
        tl.store(p_dw, dw, mask=mask)
        if SUM_LHS:  # noqa: SIM102  a compile-time branch around a run-time one
            if i_n == 0:
                p_db = db_ptr + expert.to(tl.int64) * M + o_m
                tl.store(p_db, total.to(db_ptr.dtype.element_ty), mask=o_m < M)


def grouped_wgrad(
    lhs: Tensor,
    rhs: Tensor,
    offsets_E1: Tensor,
    slots_R: Tensor,
    top_k: int,
    gather: str,
    sum_lhs: bool,
    out_dtype: torch.dtype,
    into_EMN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    experts, m, n = offsets_E1.shape[0] - 1, lhs.shape[1], rhs.shape[1]
    if slots_R.shape[0] == 0:
        return (
            lhs.new_zeros((experts, m, n), dtype=out_dtype) if into_EMN is None else into_EMN,
            lhs.new_zeros((experts if sum_lhs else 0, m), dtype=out_dtype),
        )
    dw_EMN = lhs.new_empty((experts, m, n), dtype=out_dtype) if into_EMN is None else into_EMN
    if n == 0:  # the sums alone: a product with a column of ones (eight, the narrowest)
        ones = rhs.new_ones(rhs.shape[0], 8)
        sums, nothing = grouped_wgrad(lhs, ones, offsets_E1, slots_R, top_k, gather, False, out_dtype)
        return dw_EMN, sums[..., 0].contiguous() if sum_lhs else nothing
    db_EM = lhs.new_empty((experts if sum_lhs else 0, m), dtype=out_dtype)
    row = "grouped_wgrad_lhs" if gather == "lhs" else "grouped_wgrad_rhs"
    config = tiles(row, capability(lhs.device), lhs.element_size())
    lhs, rhs = rows_contiguous(lhs), rows_contiguous(rhs)
    launch(
        lhs.device,
        Launch(
            grouped_wgrad_kernel,
            (min(config.per_sm * num_sms(lhs.device), experts * cdiv(m, config.block_m) * cdiv(n, config.block_n)),),
            {
                "lhs": lhs if gather == "lhs" else row_descriptor(lhs, config.block_k, config.block_m),
                "rhs": rhs if gather == "rhs" else row_descriptor(rhs, config.block_k, config.block_n),
                "dw_ptr": dw_EMN,
                "db_ptr": db_EM if sum_lhs else dw_EMN,
                "offsets_ptr": offsets_E1,
                "slots_ptr": slots_R,
                "num_experts": experts,
                "M": m,
                "N": n,
                "stride_lhs": lhs.stride(0),
                "stride_rhs": rhs.stride(0),
            },
            {
                "TOP_K": top_k,
                "GATHER_LHS": gather == "lhs",
                "GATHER_RHS": gather == "rhs",
                "SUM_LHS": sum_lhs,
                "ACCUMULATE": into_EMN is not None,
                "EVEN": (m % config.block_m if gather == "lhs" else n % config.block_n) == 0,
                "PRECISION": input_precision(lhs.dtype),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config.num_warps,
            config.num_stages,
        ),
    )
    return dw_EMN, db_EM
