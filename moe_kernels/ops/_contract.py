"""What the ops share of their contracts: the checks, each naming the argument, what came and what is accepted.

Shape letters: T tokens, K experts per token, R = T*K routed rows, E experts, D hidden, I expert intermediate.
"""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)

#: Activations between the two expert products. Gated ones split the pre-activation into gate and up columns: halves, or
#: in turn where it is interleaved. Clamped ones hold the gate below ``limit`` and up within it, on both sides:
#:     swiglu_oai             (up + 1) * gate * sigmoid(alpha * gate)     both clamped
#:     swiglu_clamp_before    silu(gate) * up                             both clamped
#:     swiglu_clamp_after     min(silu(gate), limit) * up                 up clamped
CLAMPED_ACTIVATIONS = ("swiglu_oai", "swiglu_clamp_before", "swiglu_clamp_after")
GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", *CLAMPED_ACTIVATIONS)
PLAIN_ACTIVATIONS = ("relu2", "gelu", "gelu_tanh", "silu")
ACTIVATIONS = GATED_ACTIVATIONS + PLAIN_ACTIVATIONS

#: The end of the schema of an op with an activation.
ACTIVATION_OPTIONS = "float? alpha=None, float? limit=None, bool interleaved=False"


def is_gated(activation: str) -> bool:
    return activation in GATED_ACTIVATIONS


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return repr(value)


def fail(op: str, argument: str, value: object, accepted: str) -> None:
    raise ValueError(f"{op}: {argument} must be {accepted}, got {describe(value)}")


def check_matrix(op: str, argument: str, value: Tensor, dims: int, shape: str) -> None:
    """A floating-point tensor of ``dims`` dimensions; ``shape`` names them for the message."""
    if value.dim() != dims:
        fail(op, argument, value, f"{dims}-dimensional, {shape}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {argument} must be float32, bfloat16, float16 or float64 (reference only), got {describe(value)}"
        )


def check_size(op: str, argument: str, value: Tensor, dim: int, size: int, because: str) -> None:
    if value.shape[dim] != size:
        fail(op, argument, value, f"of size {size} in dimension {dim} ({because})")


def check_device(op: str, argument: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        fail(op, argument, value, f"on {like.device} like {like_name}")


def check_like(op: str, argument: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Same device and dtype as the tensor called ``like_name``."""
    check_device(op, argument, value, like, like_name)
    if value.dtype != like.dtype:
        raise TypeError(f"{op}: {argument} must be {like.dtype} like {like_name}, got {describe(value)}")


def check_index(op: str, argument: str, value: Tensor, dims: int, shape: str, like: Tensor) -> None:
    """A contiguous int32 plan tensor on the device of ``like``."""
    if value.dtype != torch.int32 or value.dim() != dims or not value.is_contiguous():
        fail(op, argument, value, f"a contiguous int32 tensor {shape} from routing_plan")
    if value.device != like.device:
        fail(op, argument, value, f"on {like.device} like the data")


def check_weights(op: str, weights: Tensor | None, tokens: int, top_k: int, like: Tensor, like_name: str) -> None:
    """Routing weights [T, K] of any float dtype, or None."""
    if weights is None:
        return
    check_matrix(op, "weights", weights, 2, "[T, K]")
    check_device(op, "weights", weights, like, like_name)
    if weights.shape != (tokens, top_k):
        fail(op, "weights", weights, f"of shape {[tokens, top_k]}")


def check_offsets(op: str, offsets: Tensor, like: Tensor) -> None:
    check_index(op, "offsets", offsets, 1, "[E+1]", like)
    if offsets.shape[0] < 2:
        fail(op, "offsets", offsets, "of at least 2 elements, E + 1")


def check_activation(
    op: str, activation: str, alpha: float | None = None, limit: float | None = None, interleaved: bool = False
) -> None:
    if activation not in ACTIVATIONS:
        fail(op, "activation", activation, "one of " + ", ".join(ACTIVATIONS))
    is_taken = {"alpha": activation == "swiglu_oai", "limit": activation in CLAMPED_ACTIVATIONS}
    for name, value in (("alpha", alpha), ("limit", limit)):
        if not is_taken[name]:
            if value is not None:
                fail(op, name, value, f"None: {activation} has none")
        elif not isinstance(value, (int, float, torch.SymFloat)) or not 0 < value < math.inf:
            fail(op, name, value, f"a positive finite number, which {activation} needs")
    if interleaved and not is_gated(activation):
        fail(op, "interleaved", interleaved, f"False: {activation} has no gate")


def check_block_m(op: str, block_m: int) -> None:
    if block_m < 16 or block_m > 128 or block_m & (block_m - 1):
        fail(op, "block_m", block_m, "a power of two from 16 to 128")
