"""The ops: one file each, the schema and the contract, no arithmetic. Importing this package defines them all."""

from moe_kernels.ops import (  # noqa: F401  imported for their torch.library definitions
    combine,
    d_activation,
    gate_up,
    grouped_gemm,
    grouped_wgrad,
    permute,
    routing_plan,
    topk_route,
    unpermute,
)
