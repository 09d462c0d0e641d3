"""What an autocast region around a function means for it; asked in a way that torch.compile can trace."""

import contextlib

import torch
from torch import Tensor


def under_autocast(device_type: str) -> bool:
    # A device without autocast (meta) would make the query raise; Dynamo can't trace the first question.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def products_dtype(tensor: Tensor, device_type: str) -> torch.dtype:
    """What products with ``tensor`` run in: autocast's dtype inside it (float64 is left alone), or the tensor's own."""
    if tensor.dtype == torch.float64 or not under_autocast(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``tensor.to(dtype)``, which costs 1 µs where there is nothing to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """For a backward that is called inside an autocast region."""
    return torch.autocast(device_type, enabled=False) if under_autocast(device_type) else contextlib.nullcontext()
