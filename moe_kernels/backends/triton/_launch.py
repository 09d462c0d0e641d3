"""The one place that launches a Triton kernel: device guard, SM count, descriptors, the key of the tile table.

A launch is a value (:class:`Launch`) before it is an action, so that the ahead-of-time tests compile exactly what a
GPU would run.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.backends.triton import interpreted

#: Architecture family assumed where there is no GPU to ask (interpreter, ahead-of-time compilation).
_WITHOUT_GPU = (9, 0)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]  # run-time arguments by name, in the kernel's order
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True  # a * b + c in one rounding where the compiler likes


def compile_options(launch: Launch) -> dict[str, Any]:
    return {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.fp_fusion,
    }


def launch(device: torch.device, launch: Launch) -> None:
    """Run on the current stream of ``device``, whichever device is current."""
    options = compile_options(launch)
    if device.type != "cuda":
        launch.kernel[launch.grid](**launch.args, **launch.constexprs, **options)
        return
    with torch.cuda.device(device):
        launch.kernel[launch.grid](**launch.args, **launch.constexprs, **options)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _WITHOUT_GPU


@functools.cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4 if interpreted() else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def input_precision(dtype: torch.dtype) -> str:
    """What a float32 product does with its operands: exact unless the user allowed TF32 in torch."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with unit stride inside its rows and rows that 16-byte loads can start at."""
    ok = (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
    )
    return tensor if ok else tensor.clone(memory_format=torch.contiguous_format)


def matrix_descriptor(w: Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """Descriptor of one expert's [rows, columns] tile of w [E, R, C], and whether it is stored transposed.

    A weight that another layout stores the other way round (gpt-oss) is read as it lies; the kernel transposes the
    tile on the chip.
    """
    transposed = w.stride(2) != 1 and w.stride(1) == 1
    stored = rows_contiguous(w.mT if transposed else w)
    block = [1, columns, rows] if transposed else [1, rows, columns]
    return TensorDescriptor.from_tensor(stored, block), transposed


def row_descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(rows_contiguous(tensor), [rows, columns])


def parts_descriptor(tensor: Tensor, parts: int, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of a contiguous [R, parts * width] tensor as [R, parts, width], one part's tile at a time."""
    return TensorDescriptor.from_tensor(tensor.view(tensor.shape[0], parts, -1), [rows, 1, columns])


cdiv = triton.cdiv
