"""Fast, lean Mixture-of-Experts training for PyTorch and Hugging Face Transformers v5.

``import moe_kernels.auto`` accelerates every supported model loaded afterwards. Without Hugging Face, use
``moe_kernels.functional`` and ``moe_kernels.modules``.
"""

from moe_kernels.backends import use_backend
from moe_kernels.version import __version__

__all__ = ["__version__", "disable", "enable", "patch", "report", "use_backend"]

_HUGGING_FACE = ("disable", "enable", "patch", "report")


def __getattr__(name: str):
    # Transformers takes seconds to import: users of the plain ops don't pay for it.
    if name in _HUGGING_FACE:
        from moe_kernels.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module 'moe_kernels' has no attribute {name!r}")
