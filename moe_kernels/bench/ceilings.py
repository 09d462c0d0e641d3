"""What this GPU can do, to hold the kernels against: copy and matmul rate, and the bound t_b of a layer.

Cards of one kind differ by some percent, so the ceilings are measured in the run whose figures they stand beside.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_kernels.bench.measure import median_ms
from moe_kernels.bench.shapes import Shape

_BLOCK = 64  # rows: the padding of each expert's rows that the bound allows


def copy_rate() -> float:
    """Device-to-device copy in bytes per second, read + written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source)) * 1e3


def matmul_rate(size: int = 8192) -> float:
    """FLOP/s of one large bf16 product of random operands."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / median_ms(lambda: a @ a) * 1e3


PRODUCTS = ("up", "down", "d_a", "dx", "dw_gate_up", "dw_down")


def products(shape: Shape, *names: str, device: str = "cuda") -> dict[str, Callable[[], Tensor]]:
    """``torch.bmm`` on equal groups for products of a layer's forward and backward: all six, or those named.

    To be timed in turn with what they are compared with. Sustained, the GPU draws its power limit and lowers its clock;
    a product timed alone for some ms would not, and a loop of them meets another clock than a loop of steps.
    """
    per_expert = shape.rows // shape.E
    sizes = {
        "up": (per_expert, shape.D, shape.N),
        "down": (per_expert, shape.I, shape.D),
        "d_a": (per_expert, shape.D, shape.I),
        "dx": (per_expert, shape.N, shape.D),
        "dw_gate_up": (shape.N, per_expert, shape.D),
        "dw_down": (shape.D, per_expert, shape.I),
    }
    runs = {}
    for name in names or PRODUCTS:
        m, k, n = sizes[name]
        a = torch.randn(shape.E, m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(shape.E, k, n, device=device, dtype=torch.bfloat16)
        runs[name] = functools.partial(torch.bmm, a, b)
    return runs


def padding(rows_per_expert: Tensor) -> float:
    """By how much the rows grow when each expert's are rounded up to whole blocks."""
    return float(((rows_per_expert + _BLOCK - 1) // _BLOCK * _BLOCK).sum() / rows_per_expert.sum())


def bound(shape: Shape, times: Mapping[str, float], padded: float, bytes_per_second: float) -> dict[str, float]:
    """t_b: the products times the padding, plus the bytes of the combines at the copy rate.

    It has no gather, no activation and no router: 1.0 is a hard goal. The backward sums dX as the forward sums the
    output; each sum reads R rows and writes T.
    """
    products = {name: times[name] for name in PRODUCTS}
    combine = 2 * (shape.rows + shape.T) * shape.D / bytes_per_second * 1e3
    return {
        **{f"{name}_ms": value for name, value in products.items()},
        "padding": padded,
        "combine_ms": combine,
        "forward_ms": (products["up"] + products["down"]) * padded + combine,
        "step_ms": sum(products.values()) * padded + 2 * combine,
    }
