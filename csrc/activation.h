// The activations between the expert products, by name; activation.cuh has their formulas.
#pragma once

namespace moe_kernels {

enum class Activation : int {
    kSwiGLU = 0,
    kGeGLU,
    kGeGLUTanh,
    kSwiGLUOAI,
    kSwiGLUClampBefore,
    kSwiGLUClampAfter,
    kSiLU,
    kGELU,
    kGELUTanh,
    kReLU2
};

constexpr bool is_gated(Activation activation) { return activation <= Activation::kSwiGLUClampAfter; }

// With its numbers, as an op is asked for it.
struct ActivationChoice {
    Activation activation;
    float alpha, limit;  // of the clamped ones
    bool interleaved;    // gate and up rows of the weights, columns of H and elements of the bias come in turn
};

}  // namespace moe_kernels
