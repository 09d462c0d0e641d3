// d_activation on Hopper: see d_activation.cu. Elements are bfloat16, rows 16-byte aligned, widths multiples of 8.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "launch.h"
#include "plan.h"
#include "weights.h"

namespace moe_kernels {

// N = 2I with a gate, else I.
struct DActivationArguments {
    void* dh;           // [R, N] contiguous, may be h
    void* a;            // [R, I] contiguous: s * act(H)
    float* partial;     // [ceil(I / kTileN), T * K]: sums over the columns of a tile, by slot
    const void* h;      // [R, N] contiguous
    const void* d_out;  // [T, D]
    int64_t d_out_stride;
    Weights w;            // [E, D, I], or along: [E, I, D]
    bool along;           // stored along the reduction
    const void* weights;  // [T, K] contiguous
    DType weights_dtype;
    int64_t inner, reduced;  // I, D
    ActivationChoice activation;
};

void d_activation(const DActivationArguments& arguments, const Plan& plan, const Launch& launch);

}  // namespace moe_kernels
