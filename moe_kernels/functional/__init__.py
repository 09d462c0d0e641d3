"""The functions users call, differentiable, on plain tensors: route, plan, run the experts, the pieces; load balance.

Shape letters: T tokens, K experts per token, R = T*K routed rows, E experts, D hidden, I expert intermediate.
"""

from moe_kernels.functional.grouped_gemm import grouped_gemm
from moe_kernels.functional.load_balance import ExpertLoad, expert_load, update_selection_bias_
from moe_kernels.functional.moe_experts import moe_experts
from moe_kernels.functional.permute import permute, unpermute
from moe_kernels.functional.routing_plan import RoutingPlan, routing_plan
from moe_kernels.functional.topk_route import topk_route

__all__ = [
    "ExpertLoad",
    "RoutingPlan",
    "expert_load",
    "grouped_gemm",
    "moe_experts",
    "permute",
    "routing_plan",
    "topk_route",
    "unpermute",
    "update_selection_bias_",
]
