"""The door to ``moe_kernels._C``: can it be used, and the one place that launches.

Nothing here touches a GPU before :func:`launch`; importing works without a driver, without a GPU and without ``_C``.
"""

import functools
import importlib
from types import ModuleType

import torch

#: Oldest driver branch that runs binaries of a CUDA major version.
_DRIVERS = {12: 525, 13: 580}


@functools.cache
def _load() -> ModuleType | ImportError:
    try:
        return importlib.import_module("moe_kernels._C")
    except ImportError as error:
        return error


@functools.cache
def unavailable() -> str | None:
    """Why the extension can't run on this machine whatever its GPU, or None when it can."""
    extension = _load()
    if isinstance(extension, ModuleNotFoundError):
        return "the extension moe_kernels._C is not built (MOE_KERNELS_BUILD_CUDA=1 builds it or says why not)"
    if isinstance(extension, ImportError):
        return f"the extension moe_kernels._C can't be imported ({extension})"
    return driver_too_old(extension.driver_version(), extension.cuda_version)


def driver_too_old(driver_version: int, cuda_version: str) -> str | None:
    """A statically linked CUDA runtime needs a driver of its own major version or a newer one."""
    major = int(cuda_version.partition(".")[0])
    if driver_version == 0:
        return "no NVIDIA driver was found"
    if driver_version // 1000 < major:
        found = f"{driver_version // 1000}.{driver_version % 1000 // 10}"
        needed = f"driver {_DRIVERS[major]} or newer" if major in _DRIVERS else "a newer driver"
        return (
            f"the driver serves CUDA {found}, but the extension was built with CUDA {cuda_version} and needs {needed}"
        )
    return None


def architectures() -> str:
    """Compute capabilities the extension was compiled for, e.g. "80,90,100,120"; "" without the extension."""
    extension = _load()
    return "" if isinstance(extension, ImportError) else extension.architectures


def runs_on(capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor version up; the last one's PTX on all newer GPUs."""
    major, minor = capability
    compiled = [divmod(int(arch), 10) for arch in architectures().split(",") if arch]
    native = any(major == m and minor >= n for m, n in compiled)
    return native or (bool(compiled) and capability >= compiled[-1])


@functools.cache
def dtype_codes() -> dict[torch.dtype | None, int]:
    """How ``_C`` spells the dtypes it takes; None stands for an absent tensor."""
    extension = _load()
    return {
        None: extension.NONE,
        torch.float32: extension.FLOAT32,
        torch.bfloat16: extension.BFLOAT16,
        torch.float16: extension.FLOAT16,
    }


@functools.cache
def _activations() -> dict[str, tuple[int, bool]]:
    return _load().ACTIVATIONS


def activation_arguments(activation: str, alpha: float | None, limit: float | None, interleaved: bool) -> dict:
    """An activation as the kernels of ``_C`` take it."""
    code, _ = _activations()[activation]
    return {"activation": code, "alpha": alpha or 0.0, "limit": limit or 0.0, "interleaved": interleaved}


def is_gated(activation: str) -> bool:
    return _activations()[activation][1]


@functools.cache
def _scorings() -> dict[str, int]:
    return _load().SCORINGS


def route_rule(scoring, after, renormalize, epsilon, scale, min_sum, soft_cap, step: torch.dtype):
    """How scores become weights, as ``_C`` takes it."""
    return _load().RouteRule(
        scoring=_scorings()[scoring],
        after=after,
        renormalize=renormalize,
        epsilon=epsilon,
        scale=scale,
        min_sum=min_sum,
        soft_cap=soft_cap,
        step=dtype_codes()[step],
    )


def routing_plan_workspace(num_slots: int, num_experts: int, num_sms: int) -> int:
    return _load().routing_plan_workspace(num_slots=num_slots, num_experts=num_experts, num_sms=num_sms)


def row_sums_workspace(num_rows: int, num_experts: int, width: int) -> int:
    return _load().row_sums_workspace(num_rows=num_rows, num_experts=num_experts, width=width)


def launch(name: str, device: torch.device, **arguments) -> None:
    """Run a kernel of ``_C`` on the current stream of ``device``, which need not be the current device."""
    run = getattr(_load(), name)
    # The handle itself, as Triton's launcher asks for it: torch.cuda.current_stream() makes an object, 6 µs.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    if device.index == torch.cuda.current_device():
        run(**arguments, stream=stream)
        return
    with torch.cuda.device(device):
        run(**arguments, stream=stream)


def has_sm90() -> bool:
    """Whether the Hopper kernels were compiled."""
    extension = _load()
    return getattr(extension, "sm90", False)


def tile_columns() -> int:
    """Width of the Hopper kernels' tile of a product."""
    return _load().TILE_N


@functools.cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_sm90(name: str, device: torch.device, **arguments) -> None:
    """The same for a kernel whose blocks, one a multiprocessor, draw their tiles from a counter."""
    # Alive until the kernel is in the stream: whatever gets this memory next comes after it.
    counter = torch.empty(1, dtype=torch.int32, device=device)
    launch(name, device, **arguments, num_sms=num_sms(device), counter=address(counter))


def plan_of(offsets_E1, slots_R, tiles_2M, rows: int, top_k: int):
    """The routing plan as ``_C`` takes it; slots or tiles may be None where a kernel has no use for them."""
    num_tiles, num_experts = 0 if tiles_2M is None else tiles_2M.shape[1], offsets_E1.shape[0] - 1
    addresses = address(offsets_E1), address(slots_R), address(tiles_2M)
    return _load().Plan(*addresses, num_tiles, num_experts, rows, top_k)


def weights_of(w: torch.Tensor):
    """Weights [E, rows, columns] as ``_C`` takes them."""
    (_, rows, columns), (expert_stride, row_stride, _) = w.shape, w.stride()
    return _load().Weights(address(w), rows, columns, row_stride, expert_stride)


def aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its rows can be read 16 bytes at a time, as every slice of ours can; else a copy."""
    if tensor.data_ptr() % 16 == 0:
        unit = 16 // tensor.element_size()
        if tensor.is_contiguous() and tensor.shape[-1] % unit == 0:
            return tensor  # as most are: no look at each stride
        *strides, inner = tensor.stride()
        # The stride of a single row says nothing, and torch leaves it as it happens to be.
        if inner == 1 and all(stride % unit == 0 or size <= 1 for stride, size in zip(strides, tensor.shape)):
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
