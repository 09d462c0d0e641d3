"""``import moe_kernels.auto`` is ``moe_kernels.enable()``, for scripts one doesn't want to edit further."""

from moe_kernels.integrations.transformers import enable, is_enabled

if not is_enabled():  # keeps the options of an earlier enable(...)
    enable()
