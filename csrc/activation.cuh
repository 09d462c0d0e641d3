// The nonlinearities between the expert products, and the derivatives where a kernel needs them, in float.
#pragma once

#include <type_traits>

#include "activation.h"
#include "require.h"

namespace moe_kernels {

// The fast exponential and reciprocal are exact to 2 ulp, far below the 16-bit results. As instructions: the intrinsics
// around them care for denormal numbers and huge divisors, of which the sum below is neither.
__device__ __forceinline__ float power_of_two(float x) {
    float exponential;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(x));
    return exponential;
}

__device__ __forceinline__ float sigmoid(float g) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power_of_two(-1.44269504f * g)));
    return inverse;
}

// silu(g) = g * sigmoid(g).
__device__ __forceinline__ float silu(float g) { return g * sigmoid(g); }

__device__ __forceinline__ float gelu(float g) { return 0.5f * g * (1.0f + erff(g * 0.70710678f)); }

// 0.5 * (1 + tanh(z)) = sigmoid(2 z)
__device__ __forceinline__ float gelu_tanh(float g) { return g * sigmoid(1.59576912f * (g + 0.044715f * g * g * g)); }

// NaN stays NaN here and in the clamps, which fminf and fmaxf would hide.
__device__ __forceinline__ float relu_squared(float g) { return g < 0.0f ? 0.0f : g * g; }

__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }

__device__ __forceinline__ float within(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

template <Activation kActivation>
constexpr bool kIsGated = is_gated(kActivation);

// A of a gate and an up value; without a gate `up` is not looked at.
template <Activation kActivation>
__device__ __forceinline__ float activated(float gate, float up, float alpha, float limit) {
    using A = Activation;
    if constexpr (kActivation == A::kSwiGLUOAI) {
        gate = at_most(gate, limit);
        return gate * sigmoid(alpha * gate) * (within(up, limit) + 1.0f);
    } else if constexpr (kActivation == A::kSwiGLUClampBefore) {
        return silu(at_most(gate, limit)) * within(up, limit);
    } else if constexpr (kActivation == A::kSwiGLUClampAfter) {
        return at_most(silu(gate), limit) * within(up, limit);
    } else if constexpr (kActivation == A::kSwiGLU) {
        return silu(gate) * up;
    } else if constexpr (kActivation == A::kGeGLU) {
        return gelu(gate) * up;
    } else if constexpr (kActivation == A::kGeGLUTanh) {
        return gelu_tanh(gate) * up;
    } else if constexpr (kActivation == A::kSiLU) {
        return silu(gate);
    } else if constexpr (kActivation == A::kGELU) {
        return gelu(gate);
    } else if constexpr (kActivation == A::kGELUTanh) {
        return gelu_tanh(gate);
    } else {
        return relu_squared(gate);
    }
}

// f(g), f'(g).
struct Slope {
    float f, df;
};

// alpha: of sigmoid(alpha * g).
__device__ __forceinline__ Slope silu_slope(float g, float alpha = 1.0f) {
    const float sigma = sigmoid(alpha * g), f = g * sigma;
    return {f, sigma + alpha * f * (1.0f - sigma)};
}

__device__ __forceinline__ Slope gelu_slope(float g) {
    const float cdf = 0.5f * (1.0f + erff(g * 0.70710678f));
    return {g * cdf, cdf + g * 0.39894228f * power_of_two(-0.72134752f * g * g)};
}

__device__ __forceinline__ Slope gelu_tanh_slope(float g) {
    const float sigma = sigmoid(1.59576912f * (g + 0.044715f * g * g * g)), f = g * sigma;
    return {f, sigma + f * (1.0f - sigma) * 1.59576912f * (1.0f + 0.134145f * g * g)};
}

// A, and its derivatives in gate and up. A clamp's is 0 where it held a value (NaN too, as torch has it) and 1 at the
// bounds themselves.
struct Gradients {
    float a, gate, up;
};

template <Activation kActivation>
__device__ __forceinline__ Gradients gradients(float gate, float up, float alpha, float limit) {
    using A = Activation;
    if constexpr (kActivation == A::kSwiGLUOAI || kActivation == A::kSwiGLUClampBefore) {
        constexpr bool kOAI = kActivation == A::kSwiGLUOAI;
        const Slope s = silu_slope(at_most(gate, limit), kOAI ? alpha : 1.0f);
        const float factor = within(up, limit) + (kOAI ? 1.0f : 0.0f);
        return {s.f * factor, gate <= limit ? factor * s.df : 0.0f, fabsf(up) <= limit ? s.f : 0.0f};
    } else if constexpr (kActivation == A::kSwiGLUClampAfter) {
        const Slope s = silu_slope(gate);
        const float factor = within(up, limit), f = at_most(s.f, limit);
        return {f * factor, (s.f <= limit ? factor : 0.0f) * s.df, fabsf(up) <= limit ? f : 0.0f};
    } else if constexpr (kActivation == A::kReLU2) {
        const float positive = gate < 0.0f ? 0.0f : gate;
        return {positive * positive, 2.0f * positive, 0.0f};
    } else {
        Slope s;
        if constexpr (kActivation == A::kSwiGLU || kActivation == A::kSiLU) {
            s = silu_slope(gate);
        } else if constexpr (kActivation == A::kGeGLU || kActivation == A::kGELU) {
            s = gelu_slope(gate);
        } else {
            static_assert(kActivation == A::kGeGLUTanh || kActivation == A::kGELUTanh, "no formula");
            s = gelu_tanh_slope(gate);
        }
        if constexpr (kIsGated<kActivation>) return {s.f * up, up * s.df, s.f};
        return {s.f, s.df, 0.0f};
    }
}

// How the pre-activation H lies: I columns; I gate columns before I up columns; or gate and up columns in turn.
enum class Layout { kPlain, kHalves, kInTurn };

template <Layout kLayout>
constexpr int kPartsOf = kLayout == Layout::kHalves ? 2 : 1;  // of H
template <Layout kLayout>
constexpr int kRatioOf = kLayout == Layout::kPlain ? 1 : 2;  // of H's columns to A's

// Host: call(activation, layout) with both as types that know their value.
template <typename Call>
void with_activation(const char* op, const ActivationChoice& choice, Call call) {
    auto with = [&](auto activation) {
        if constexpr (is_gated(activation.value)) {
            if (choice.interleaved) {
                call(activation, std::integral_constant<Layout, Layout::kInTurn>{});
            } else {
                call(activation, std::integral_constant<Layout, Layout::kHalves>{});
            }
        } else {
            require(!choice.interleaved, op, ": interleaved needs a gated activation");
            call(activation, std::integral_constant<Layout, Layout::kPlain>{});
        }
    };
    using A = Activation;
    switch (choice.activation) {
        case A::kSwiGLU: return with(std::integral_constant<A, A::kSwiGLU>{});
        case A::kGeGLU: return with(std::integral_constant<A, A::kGeGLU>{});
        case A::kGeGLUTanh: return with(std::integral_constant<A, A::kGeGLUTanh>{});
        case A::kSwiGLUOAI: return with(std::integral_constant<A, A::kSwiGLUOAI>{});
        case A::kSwiGLUClampBefore: return with(std::integral_constant<A, A::kSwiGLUClampBefore>{});
        case A::kSwiGLUClampAfter: return with(std::integral_constant<A, A::kSwiGLUClampAfter>{});
        case A::kSiLU: return with(std::integral_constant<A, A::kSiLU>{});
        case A::kGELU: return with(std::integral_constant<A, A::kGELU>{});
        case A::kGELUTanh: return with(std::integral_constant<A, A::kGELUTanh>{});
        case A::kReLU2: return with(std::integral_constant<A, A::kReLU2>{});
    }
    require(false, op, ": no activation ", static_cast<int>(choice.activation));
}

}  // namespace moe_kernels
