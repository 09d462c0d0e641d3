// d_activation on Hopper: see d_activation.cu. Elements are bfloat16, rows 16-byte aligned, widths multiples of 8.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "launch.h"
#include "plan.h"
#include "weights.h"

namespace moe_kernels {

struct DActivationArguments {
    void* dh;           // [R, 2I] contiguous, may be h
    void* a;            // [R, I] contiguous: s * act(H)
    float* partial;     // [ceil(I / kTileN), T * K]: sums over the columns of a tile, by slot
    const void* h;      // [R, 2I] contiguous
    const void* d_out;  // [T, D]
    int64_t d_out_stride;
    Weights w;            // [E, D, I]
    const void* weights;  // [T, K] contiguous
    DType weights_dtype;
    int64_t inner, reduced;  // I, D
};

void d_activation(const DActivationArguments& arguments, const Plan& plan, const Launch& launch);

}  // namespace moe_kernels
