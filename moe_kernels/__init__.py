"""Fast, lean Mixture-of-Experts training for PyTorch and Hugging Face Transformers v5.

``import moe_kernels.auto`` accelerates every supported model loaded afterwards. Without Hugging Face, use
``moe_kernels.functional`` and ``moe_kernels.modules``.
"""

import importlib

from moe_kernels.version import __version__

__all__ = ["LoadBalanceCallback", "__version__", "disable", "enable", "patch", "report", "use_backend"]

#: Where each public name lives. Imported at first use: torch takes a second, Transformers several.
_HOME = {
    "LoadBalanceCallback": "moe_kernels.integrations.transformers.load_balance",
    "disable": "moe_kernels.integrations.transformers",
    "enable": "moe_kernels.integrations.transformers",
    "patch": "moe_kernels.integrations.transformers",
    "report": "moe_kernels.integrations.transformers",
    "use_backend": "moe_kernels.backends",
}


_SUBPACKAGES = ("functional", "modules")


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return importlib.import_module(f"moe_kernels.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moe_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBPACKAGES})
