// The nonlinearities between the expert products, and the derivative where a kernel needs it, in float.
#pragma once

namespace moe_kernels {

// The fast exponential and reciprocal are exact to 2 ulp, far below the 16-bit results. As instructions: the intrinsics
// around them care for denormal numbers and huge divisors, of which the sum below is neither.
__device__ __forceinline__ float sigmoid(float g) {
    float exponential, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(-1.44269504f * g));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exponential));
    return inverse;
}

// silu(g) = g * sigmoid(g).
__device__ __forceinline__ float silu(float g) { return g * sigmoid(g); }

// silu(g) and its derivative sigmoid(g) * (1 + g * (1 - sigmoid(g))).
__device__ __forceinline__ void silu_and_derivative(float g, float& f, float& df) {
    const float sigma = sigmoid(g);
    f = g * sigma;
    df = sigma + f * (1.0f - sigma);
}

__device__ __forceinline__ float gelu(float g) { return 0.5f * g * (1.0f + erff(g * 0.70710678f)); }

// 0.5 * (1 + tanh(z)) = sigmoid(2 z)
__device__ __forceinline__ float gelu_tanh(float g) { return g * sigmoid(1.59576912f * (g + 0.044715f * g * g * g)); }

// NaN stays NaN here and in the clamps, which fminf and fmaxf would hide.
__device__ __forceinline__ float relu_squared(float g) { return g < 0.0f ? 0.0f : g * g; }

__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }

__device__ __forceinline__ float within(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

}  // namespace moe_kernels
