"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and up, in float32, bfloat16 and float16.

On a machine without a GPU they run in Triton's interpreter when TRITON_INTERPRET=1 is set, in float32 only (its
bfloat16 arithmetic is wrong): that is how they are tested there.
"""

import functools
import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(op: str, problem) -> str | None:
    reason = _device(problem.device)
    if reason is not None:
        return reason
    if problem.dtype is not None and problem.dtype not in DTYPES:
        return f"no kernel for {str(problem.dtype).removeprefix('torch.')}"
    if interpreted() and problem.dtype not in (None, torch.float32):
        return "Triton's interpreter is right in float32 only"
    for size in problem.dims:
        if size % 8:
            return f"width {size} is not a multiple of 8"
    return None


@functools.cache
def _device(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton can't be imported ({error})"
    if interpreted() and device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"no Triton kernels for device type {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
    return None
