"""Hugging Face Transformers v5: ``enable()`` runs its MoE models on the kernels, ``report(model)`` says which."""

from moe_kernels.integrations.transformers._version import require_transformers

require_transformers()  # before the modules below, whose imports would fail with a message that names no remedy

from moe_kernels.integrations.transformers.experts import moe_kernels_experts_forward  # noqa: E402
from moe_kernels.integrations.transformers.hook import disable, enable, is_enabled, patch  # noqa: E402
from moe_kernels.integrations.transformers.report import report  # noqa: E402

__all__ = ["disable", "enable", "is_enabled", "moe_kernels_experts_forward", "patch", "report"]
