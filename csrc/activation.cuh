// The nonlinearity of a gated layer and its derivative, in float.
#pragma once

namespace moe_kernels {

// silu(g) = g * sigmoid(g). The fast exponential and division are exact to 2 ulp, far below the 16-bit results.
__device__ __forceinline__ float sigmoid(float g) { return __fdividef(1.0f, 1.0f + __expf(-g)); }

__device__ __forceinline__ float silu(float g) { return g * sigmoid(g); }

// silu(g) and its derivative sigmoid(g) * (1 + g * (1 - sigmoid(g))).
__device__ __forceinline__ void silu_and_derivative(float g, float& f, float& df) {
    const float sigma = sigmoid(g);
    f = g * sigma;
    df = sigma + f * (1.0f - sigma);
}

}  // namespace moe_kernels
