"""Tile sizes of the Triton kernels, one row per case, the reason beside it. Nothing is tuned at run time.

``block_m`` comes with the routing plan (rows per expert decide it); a row here says what to do beside it. The shared
memory of every row is checked against the architecture's limit by the ahead-of-time tests. H100 figures in the
reasons are TFLOP/s at the Qwen3-30B-A3B shape (T 16384, D 2048, I 768, E 128, K 8) where a plain matmul does 754.
"""

from typing import NamedTuple

#: Bytes of shared memory a block may have, by compute capability.
SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (11, 0): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}
_SMALLEST = 99 * 1024


class Tiles(NamedTuple):
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_m: int = 0  # of the weight gradient, whose tiles are not rows of the plan
    per_sm: int = 1  # programs a multiprocessor holds at once: one's epilogue then hides behind another's products
    group_m: int = 8  # row tiles that share a column of weights before the next column


# Two classes of GPU: "large" has the shared memory of a data-centre part (A100, H100, B200), "small" 99 KB
# (RTX 30/40/50, DGX Spark). Keyed by (op, bytes per element, block_m); block_m 0 is the weight gradient. "Not measured"
# rows follow the rule that is named; the KB behind them are the shared memory of the op's largest variant, compiled for
# sm_90 in the first table and for sm_120 in the second (Triton 3.6.0).
_LARGE = {
    # Two accumulators of 128x128 (gate, up): 542; 3 stages 537, 128x(2*64) 380, 64x(2*128) 417.
    ("gate_up", 2, 128): Tiles(128, 64, 8, 4),
    # As wide, with the 4 warps that make 64 rows of a wgmma: the 417 above (number of stages not noted). 176 KB.
    ("gate_up", 2, 64): Tiles(128, 64, 4, 4),
    # Below the 64 rows of a wgmma: half as wide and a K step twice as long, so a stage loads as many bytes of weights.
    ("gate_up", 2, 32): Tiles(64, 128, 4, 4),  # not measured, 124 KB
    ("gate_up", 2, 16): Tiles(64, 128, 4, 4),  # not measured, 110 KB
    # Down 590, dX 650; 128x128 with 4 stages 492, two programs of 128x128 450. 4 stages do not fit.
    ("grouped_gemm", 2, 128): Tiles(256, 64, 8, 3),
    # The same tile, where 4 stages do fit.
    ("grouped_gemm", 2, 64): Tiles(256, 64, 8, 4),  # not measured, 192 KB
    # As gate_up's: half as wide, a K step twice as long.
    ("grouped_gemm", 2, 32): Tiles(128, 128, 4, 4),  # not measured, 128 KB
    ("grouped_gemm", 2, 16): Tiles(128, 128, 4, 4),  # not measured, 112 KB
    # The product alone, without the activation's backward: grouped_gemm's tiles with gathered rows. 4 stages of the
    # tallest do not fit. The fused kernel (128x256 in four column parts) did 312; predicted for both launches: 1.1 ms,
    # 370.
    ("d_activation", 2, 128): Tiles(256, 64, 8, 3),  # not measured, 208 KB
    ("d_activation", 2, 64): Tiles(256, 64, 8, 4),  # not measured, 192 KB
    ("d_activation", 2, 32): Tiles(128, 128, 4, 4),  # not measured, 128 KB
    ("d_activation", 2, 16): Tiles(128, 128, 4, 4),  # not measured, 112 KB
    # 5 stages: the index of a gathered row is a load that the row's own load waits for, so 3 or 4 stages keep only one
    # step of rows in flight. Gathered lhs (dW_down): one program of 128x256 529; two of 128x128 468, 256x128 412.
    ("grouped_wgrad_lhs", 2, 0): Tiles(256, 64, 8, 5, block_m=128),
    # Gathered rhs (dW_gate_up) or neither: two programs share a multiprocessor, 469; with 3 stages 417; one program of
    # 128x256 419, of 256x128 447.
    ("grouped_wgrad_rhs", 2, 0): Tiles(128, 64, 4, 5, block_m=128, per_sm=2),
    # float32 runs on the slow units, so only shared memory matters: smaller tiles and a K step of 32 for elements twice
    # as large, 3 stages, within the 163 KB of sm_80.
    ("gate_up", 4, 128): Tiles(64, 32, 8, 3),  # not measured, 104 KB
    ("gate_up", 4, 64): Tiles(64, 32, 4, 3),  # not measured, 72 KB
    ("gate_up", 4, 32): Tiles(32, 32, 4, 3),  # not measured, 32 KB
    ("gate_up", 4, 16): Tiles(32, 32, 4, 3),  # not measured, 26 KB
    ("grouped_gemm", 4, 128): Tiles(128, 32, 8, 3),  # not measured, 144 KB
    ("grouped_gemm", 4, 64): Tiles(128, 32, 8, 3),  # not measured, 96 KB
    ("grouped_gemm", 4, 32): Tiles(64, 32, 4, 3),  # not measured, 40 KB
    ("grouped_gemm", 4, 16): Tiles(64, 32, 4, 3),  # not measured, 32 KB
    ("d_activation", 4, 128): Tiles(64, 32, 8, 3),  # not measured, 80 KB
    ("d_activation", 4, 64): Tiles(64, 32, 4, 3),  # not measured, 48 KB
    ("d_activation", 4, 32): Tiles(32, 32, 4, 3),  # not measured, 20 KB
    ("d_activation", 4, 16): Tiles(32, 32, 4, 3),  # not measured, 14 KB
    ("grouped_wgrad_lhs", 4, 0): Tiles(128, 32, 8, 3, block_m=64),  # not measured, 24 KB
    ("grouped_wgrad_rhs", 4, 0): Tiles(128, 32, 8, 3, block_m=64),  # not measured, 32 KB
}
_SMALL = _LARGE | {
    # No such GPU yet, so none of these is measured. The rule: the tiles above with a K step of 64, half as wide or with
    # fewer stages where 99 KB would not hold them.
    ("gate_up", 2, 128): Tiles(64, 64, 8, 3),  # not measured, 80 KB
    ("gate_up", 2, 64): Tiles(64, 64, 4, 3),  # not measured, 56 KB
    ("gate_up", 2, 32): Tiles(64, 64, 4, 3),  # not measured, 44 KB
    ("gate_up", 2, 16): Tiles(64, 64, 4, 3),  # not measured, 38 KB
    ("grouped_gemm", 2, 128): Tiles(128, 64, 8, 3),  # not measured, 96 KB
    ("grouped_gemm", 2, 64): Tiles(128, 64, 4, 3),  # not measured, 64 KB
    ("grouped_gemm", 2, 32): Tiles(128, 64, 4, 3),  # not measured, 48 KB
    ("grouped_gemm", 2, 16): Tiles(128, 64, 4, 3),  # not measured, 40 KB
    ("d_activation", 2, 128): Tiles(128, 64, 8, 3),  # not measured, 96 KB
    ("d_activation", 2, 64): Tiles(128, 64, 4, 3),  # not measured, 64 KB
    ("d_activation", 2, 32): Tiles(128, 64, 4, 3),  # not measured, 48 KB
    ("d_activation", 2, 16): Tiles(128, 64, 4, 3),  # not measured, 40 KB
    ("grouped_wgrad_lhs", 2, 0): Tiles(128, 64, 8, 2, block_m=128),  # not measured, 32 KB
    ("grouped_wgrad_rhs", 2, 0): Tiles(128, 64, 8, 2, block_m=128),  # not measured, 36 KB
    # float32 rows whose 3 stages take more than 99 KB: a stage less, or half as wide.
    ("gate_up", 4, 128): Tiles(64, 32, 8, 2),  # not measured, 72 KB
    ("grouped_gemm", 4, 128): Tiles(64, 32, 8, 3),  # not measured, 88 KB
}


def shared_memory_limit(capability: tuple[int, int]) -> int:
    return SHARED_MEMORY.get(capability, _SMALLEST)


def table(capability: tuple[int, int]) -> dict[tuple[str, int, int], Tiles]:
    return _LARGE if shared_memory_limit(capability) > _SMALLEST else _SMALL


def tiles(op: str, capability: tuple[int, int], element_size: int, block_m: int = 0) -> Tiles:
    """The row for an op."""
    return table(capability)[op, element_size, block_m]
