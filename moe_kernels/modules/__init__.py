"""MoE layers as plain ``nn.Module``s, without Hugging Face: the router, the experts, and the two together."""

from moe_kernels.modules.experts import Experts
from moe_kernels.modules.moe import MoE
from moe_kernels.modules.topk_router import TopKRouter

__all__ = ["Experts", "MoE", "TopKRouter"]
