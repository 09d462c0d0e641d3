// gate_up on Hopper: see gate_up.cu. Elements are bfloat16, rows 16-byte aligned, widths multiples of 8.
#pragma once

#include <cstdint>

#include "launch.h"
#include "plan.h"
#include "weights.h"

namespace moe_kernels {

struct GateUpArguments {
    void* h;        // [R, 2I] contiguous, or null
    void* a;        // [R, I] contiguous, or null
    const void* x;  // [T, D]
    int64_t x_stride;
    Weights w;               // [E, 2I, D], gate rows before up rows
    int64_t inner, reduced;  // I, D
};

void gate_up(const GateUpArguments& arguments, const Plan& plan, const Launch& launch);

}  // namespace moe_kernels
