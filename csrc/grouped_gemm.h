// grouped_gemm on Hopper: see grouped_gemm.cu. Elements are bfloat16, rows 16-byte aligned, widths multiples of 8.
#pragma once

#include <cstdint>

#include "launch.h"
#include "plan.h"
#include "weights.h"

namespace moe_kernels {

struct GroupedGemmArguments {
    void* y;        // [R, N] contiguous
    const void* a;  // [R, C]
    int64_t a_stride;
    Weights w;         // [E, N, C], or [E, C, N] if across
    bool across;       // the reduction runs across W's rows
    const void* bias;  // [E, N], or null
    int64_t bias_stride;
    int64_t width, reduced;  // N, C
};

// Columns of the tiles that it takes: kTileN where consumers share a tile, fewer where they take turns.
int grouped_gemm_tile_columns(int64_t width, int64_t reduced, bool across);

void grouped_gemm(const GroupedGemmArguments& arguments, const Plan& plan, const Launch& launch);

}  // namespace moe_kernels
