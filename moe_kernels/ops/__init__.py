"""The ops: one file each, the schema and the contract, no arithmetic. Importing this package defines them all."""

import torch
import torch.utils.checkpoint

from moe_kernels.ops import (  # noqa: F401  imported for their torch.library definitions
    combine,
    d_activation,
    decode_experts,
    gate_up,
    grouped_gemm,
    grouped_wgrad,
    permute,
    routing_plan,
    topk_route,
    unpermute,
)

# Selective checkpointing may be told to save an op's outputs and to skip it in the recomputation. Not these: they write
# into an argument, and skipping them would leave it unwritten.
torch.utils.checkpoint.SAC_IGNORED_OPS.update(
    (
        torch.ops.moe_kernels.combine.default,
        torch.ops.moe_kernels.d_activation_.default,
        torch.ops.moe_kernels.grouped_wgrad_.default,
    )
)
