"""The activations between the two expert products, forward and backward, in fp32.

Gated:     a = f(g) * u with f = silu (swiglu), gelu (geglu), tanh-gelu (geglu_tanh)
Clamped:   a = f(min(g, limit)) * (clamp(u) + 1), f(g) = g * sigmoid(alpha * g)     swiglu_oai
           a = silu(min(g, limit)) * clamp(u)                                       swiglu_clamp_before
           a = min(silu(g), limit) * clamp(u)                                       swiglu_clamp_after
Non-gated: a = f(g) with f = relu^2, gelu, tanh-gelu, silu

``alpha`` and ``limit`` are run-time numbers: a new value compiles nothing. As in torch NaN comes out of a clamp as NaN,
and a clamp's gradient is zero where it held a value; the bounds themselves pass.
"""

import triton
import triton.language as tl

GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamp_before", "swiglu_clamp_after")


@triton.jit
def plain_activation(g, ACTIVATION: tl.constexpr):
    """a = f(g), and f'(g)."""
    return _nonlinearity(g, 1.0, ACTIVATION)


@triton.jit
def gated_activation(g, u, alpha, limit, ACTIVATION: tl.constexpr):
    """a, its derivative in g, its derivative in u. What a caller leaves unused costs nothing."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    if ACTIVATION == "swiglu" or ACTIVATION == "geglu" or ACTIVATION == "geglu_tanh":
        f, df = _nonlinearity(g, alpha, ACTIVATION)
        return f * u, u * df, f
    is_u_free = tl.abs(u) <= limit
    u = tl.maximum(tl.minimum(u, limit, propagate_nan=ALL), -limit, propagate_nan=ALL)
    if ACTIVATION == "swiglu_clamp_after":
        f, df = _nonlinearity(g, alpha, ACTIVATION)
        d_g = tl.where(f <= limit, u, 0.0) * df
        f = tl.minimum(f, limit, propagate_nan=ALL)
    else:
        f, df = _nonlinearity(tl.minimum(g, limit, propagate_nan=ALL), alpha, ACTIVATION)
        if ACTIVATION == "swiglu_oai":
            u += 1.0
        d_g = tl.where(g <= limit, u * df, 0.0)
    return f * u, d_g, tl.where(is_u_free, f, 0.0)


@triton.jit
def _nonlinearity(g, alpha, ACTIVATION: tl.constexpr):
    """f(g) and f'(g)."""
    if ACTIVATION == "swiglu_oai":
        sigmoid = 1.0 / (1.0 + tl.exp(-alpha * g))
        f = g * sigmoid
        df = sigmoid + alpha * f * (1.0 - sigmoid)
    elif (
        ACTIVATION == "swiglu"
        or ACTIVATION == "silu"
        or ACTIVATION == "swiglu_clamp_before"
        or ACTIVATION == "swiglu_clamp_after"
    ):
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        f = g * sigmoid
        df = sigmoid + f * (1.0 - sigmoid)
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        f = g * cdf
        df = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "geglu_tanh" or ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) = sigmoid(2 z)
        z2 = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        half = 1.0 / (1.0 + tl.exp(-z2))
        f = g * half
        df = half + g * half * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        f = positive * positive
        df = 2.0 * positive
    return f, df
