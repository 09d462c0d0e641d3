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
# (RTX 30/40/50, DGX Spark). Keyed by (op, bytes per element, block_m); block_m 0 is the weight gradient.
_LARGE = {
    # Two accumulators of 128x128 (gate, up): 542; 3 stages 537, 128x(2*64) 380, 64x(2*128) 417.
    ("gate_up", 2, 128): Tiles(128, 64, 8, 4),
    ("gate_up", 2, 64): Tiles(128, 64, 4, 4),
    ("gate_up", 2, 32): Tiles(64, 128, 4, 4),
    ("gate_up", 2, 16): Tiles(64, 128, 4, 4),
    # Down 590, dX 650; 128x128 with 4 stages 492, two programs of 128x128 450. 4 stages do not fit.
    ("grouped_gemm", 2, 128): Tiles(256, 64, 8, 3),
    ("grouped_gemm", 2, 64): Tiles(256, 64, 8, 4),
    ("grouped_gemm", 2, 32): Tiles(128, 128, 4, 4),
    ("grouped_gemm", 2, 16): Tiles(128, 128, 4, 4),
    # The product alone, without the activation's backward: grouped_gemm's tiles with gathered rows. 4 stages of the
    # tallest do not fit. The fused kernel (128x256 in four column parts) did 312; predicted for both launches: 1.1 ms,
    # 370.
    ("d_activation", 2, 128): Tiles(256, 64, 8, 3),
    ("d_activation", 2, 64): Tiles(256, 64, 8, 4),
    ("d_activation", 2, 32): Tiles(128, 128, 4, 4),
    ("d_activation", 2, 16): Tiles(128, 128, 4, 4),
    # 5 stages: the index of a gathered row is a load that the row's own load waits for, so 3 or 4 stages keep only one
    # step of rows in flight. Gathered lhs (dW_down): one program of 128x256 529; two of 128x128 468, 256x128 412.
    ("grouped_wgrad_lhs", 2, 0): Tiles(256, 64, 8, 5, block_m=128),
    # Gathered rhs (dW_gate_up) or neither: two programs share a multiprocessor, 469; with 3 stages 417; one program of
    # 128x256 419, of 256x128 447.
    ("grouped_wgrad_rhs", 2, 0): Tiles(128, 64, 4, 5, block_m=128, per_sm=2),
    # float32 runs on the slow units: only shared memory matters.
    ("gate_up", 4, 128): Tiles(64, 32, 8, 3),
    ("gate_up", 4, 64): Tiles(64, 32, 4, 3),
    ("gate_up", 4, 32): Tiles(32, 32, 4, 3),
    ("gate_up", 4, 16): Tiles(32, 32, 4, 3),
    ("grouped_gemm", 4, 128): Tiles(128, 32, 8, 3),
    ("grouped_gemm", 4, 64): Tiles(128, 32, 8, 3),
    ("grouped_gemm", 4, 32): Tiles(64, 32, 4, 3),
    ("grouped_gemm", 4, 16): Tiles(64, 32, 4, 3),
    ("d_activation", 4, 128): Tiles(64, 32, 8, 3),
    ("d_activation", 4, 64): Tiles(64, 32, 4, 3),
    ("d_activation", 4, 32): Tiles(32, 32, 4, 3),
    ("d_activation", 4, 16): Tiles(32, 32, 4, 3),
    ("grouped_wgrad_lhs", 4, 0): Tiles(128, 32, 8, 3, block_m=64),
    ("grouped_wgrad_rhs", 4, 0): Tiles(128, 32, 8, 3, block_m=64),
}
_SMALL = _LARGE | {
    # Fewer stages and narrower tiles, until 99 KB hold them. Not measured: no such GPU yet.
    ("gate_up", 2, 128): Tiles(64, 64, 8, 3),
    ("gate_up", 2, 64): Tiles(64, 64, 4, 3),
    ("gate_up", 2, 32): Tiles(64, 64, 4, 3),
    ("gate_up", 2, 16): Tiles(64, 64, 4, 3),
    ("grouped_gemm", 2, 128): Tiles(128, 64, 8, 3),
    ("grouped_gemm", 2, 64): Tiles(128, 64, 4, 3),
    ("grouped_gemm", 2, 32): Tiles(128, 64, 4, 3),
    ("grouped_gemm", 2, 16): Tiles(128, 64, 4, 3),
    ("d_activation", 2, 128): Tiles(128, 64, 8, 3),
    ("d_activation", 2, 64): Tiles(128, 64, 4, 3),
    ("d_activation", 2, 32): Tiles(128, 64, 4, 3),
    ("d_activation", 2, 16): Tiles(128, 64, 4, 3),
    ("grouped_wgrad_lhs", 2, 0): Tiles(128, 64, 8, 2, block_m=128),
    ("grouped_wgrad_rhs", 2, 0): Tiles(128, 64, 8, 2, block_m=128),
    ("gate_up", 4, 128): Tiles(64, 32, 8, 2),
    ("grouped_gemm", 4, 128): Tiles(64, 32, 8, 3),
}


def shared_memory_limit(capability: tuple[int, int]) -> int:
    return SHARED_MEMORY.get(capability, _SMALLEST)


def table(capability: tuple[int, int]) -> dict[tuple[str, int, int], Tiles]:
    return _LARGE if shared_memory_limit(capability) > _SMALLEST else _SMALL


def tiles(op: str, capability: tuple[int, int], element_size: int, block_m: int = 0) -> Tiles:
    """The row for an op."""
    return table(capability)[op, element_size, block_m]
