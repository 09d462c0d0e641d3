"""The activations between the two expert products, forward and backward, in fp32.

Gated:     a = f(g) * u with f = silu (swiglu), gelu (geglu), tanh-gelu (geglu_tanh)
Non-gated: a = f(g) with f = relu^2, gelu, tanh-gelu, silu
"""

import triton
import triton.language as tl


@triton.jit
def nonlinearity(g, ACTIVATION: tl.constexpr):
    """f(g) and f'(g)."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
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
        positive = tl.maximum(g, 0.0)
        f = positive * positive
        df = 2.0 * positive
    return f, df
