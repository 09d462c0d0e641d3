"""CUDA C++ kernels of the extension module ``moe_kernels._C``, in float32, bfloat16 and float16.

The extension is optional: built without nvcc, or on a machine whose driver or GPU it can't serve, the package works
and ``supports`` says why this backend does not.
"""

import functools

import torch

from moe_kernels.backends.cuda import _extension


def supports(op: str, problem) -> str | None:
    reason = _extension.unavailable() or _device(problem.device)
    if reason is not None:
        return reason
    if problem.dtype is not None and problem.dtype not in _extension.dtype_codes():
        return f"no kernel for {str(problem.dtype).removeprefix('torch.')}"
    for size in problem.dims:
        if size % 8:
            return f"width {size} is not a multiple of 8"
    return None


@functools.cache
def _device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"no CUDA kernels for device type {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if not _extension.runs_on(capability):
        compiled = _extension.architectures()
        return f"compute capability {capability[0]}.{capability[1]} is not among the compiled ones ({compiled})"
    return None
