// gate_up on Hopper: see gate_up.cu. Elements are bfloat16, rows 16-byte aligned, widths multiples of 8.
#pragma once

#include <cstdint>

#include "activation.h"
#include "launch.h"
#include "plan.h"
#include "weights.h"

namespace moe_kernels {

// N = 2I with a gate, else I.
struct GateUpArguments {
    void* h;        // [R, N] contiguous, or null
    void* a;        // [R, I] contiguous, or null
    const void* x;  // [T, D]
    int64_t x_stride;
    Weights w;               // [E, N, D], or across: [E, D, N]; gate before up, or in turn
    bool across;             // stored across the reduction
    const void* bias;        // [E, N] contiguous, or null
    int64_t inner, reduced;  // I, D
    ActivationChoice activation;
};

void gate_up(const GateUpArguments& arguments, const Plan& plan, const Launch& launch);

}  // namespace moe_kernels
