"""CUDA C++ kernels of the extension module ``moe_kernels._C``.

``routing_plan``, ``topk_route``, ``permute``, ``unpermute`` and ``combine`` run on every architecture, in float32,
bfloat16 and float16, ``decode_experts`` in the two 16-bit types; the products over an expert's rows on Hopper, in
bfloat16, for what most models ask of them (``_hopper``). Triton does the rest.

The extension is optional: built without nvcc, or on a machine whose driver or GPU it can't serve, the package works
and ``supports`` says why this backend does not.
"""

import functools

import torch

from moe_kernels.backends.cuda import _extension

#: Twice a width is an int to the kernels (``csrc/require.h``).
_WIDTHS_END = 2**30


def supports(op: str, problem) -> str | None:
    reason = _extension.unavailable() or _device(problem.device)
    if reason is not None:
        return reason
    if problem.dtype is not None and problem.dtype not in _extension.dtype_codes():
        return f"no kernel for {str(problem.dtype).removeprefix('torch.')}"
    for size in problem.dims:
        if size == 0:
            return "no kernel for a width of 0"
        if size % 8:
            return f"width {size} is not a multiple of 8"
        if size >= _WIDTHS_END:
            return f"width {size} is not below 2**30"
    if op == "decode_experts":
        return _decode(problem)
    if op in ("topk_route", "topk_route_bwd"):
        refused = [trait for trait in problem.traits if trait != "groups"]
        return f"no kernel for {', '.join(refused)}" if refused else None
    return _hopper(op, problem) if op in _HOPPER else None


def _decode(problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel takes bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
    return "no kernel for transposed weights" if "transposed weights" in problem.traits else None


_HOPPER = {"gate_up", "grouped_gemm", "d_activation", "grouped_wgrad"}
#: Gathered rows are copied 64 columns at a time without a mask; these ops gather rows of width dims[0].
_GATHERS = {"gate_up", "d_activation"}
#: The tiles of a width are counted in 16 bits (``csrc/grouped_wgrad.cu``); a single width is that of row sums alone.
_WIDEST_WGRAD = 2**22
#: Beside swiglu.
_ACTIVATIONS = (
    *("geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamp_before", "swiglu_clamp_after"),
    *("relu2", "gelu", "gelu_tanh", "silu"),
)
#: Beyond the plainest call.
_HOPPER_TRAITS = {
    ("gate_up", "bias"),
    *((op, trait) for op in _GATHERS for trait in ("interleaved gate_up", "transposed weights")),
    *((op, f"activation {name}") for op in _GATHERS for name in _ACTIVATIONS),
    ("grouped_gemm", "bias"),
    ("grouped_gemm", "transposed weights"),
    ("grouped_wgrad", "float32 result"),
    ("grouped_wgrad", "gather none"),
    ("grouped_wgrad", "row sums"),
    ("grouped_wgrad", "accumulation"),
}


def _hopper(op: str, problem) -> str | None:
    if torch.cuda.get_device_capability(problem.device)[0] != 9:
        return "this kernel is for Hopper (compute capability 9.0)"
    if not _extension.has_sm90():
        return "the extension was built without its Hopper kernels (MOE_KERNELS_CUDA_ARCHS lacks 90)"
    if problem.dtype != torch.bfloat16:
        return f"the Hopper kernel takes bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    refused = [trait for trait in problem.traits if (op, trait) not in _HOPPER_TRAITS]
    if refused:
        return f"the Hopper kernel has no {', '.join(refused)}"
    if problem.block_m not in (0, 128):
        return f"the Hopper kernel makes tiles of 128 rows, the plan has {problem.block_m} (few rows an expert)"
    if op in _GATHERS and problem.dims[0] % 64:
        return f"the Hopper kernel gathers rows of a multiple of 64, not {problem.dims[0]}"
    if op == "grouped_wgrad" and len(problem.dims) == 2 and max(problem.dims) > _WIDEST_WGRAD:
        return f"the Hopper kernel takes widths of at most 2**22, not {max(problem.dims)}"
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
