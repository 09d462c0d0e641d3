// grouped_wgrad on Hopper: see grouped_wgrad.cu. Elements are bfloat16, rows 16-byte aligned, widths multiples of 8.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "launch.h"
#include "plan.h"

namespace moe_kernels {

struct GroupedWgradArguments {
    void* dw;         // [E, M, N] contiguous
    DType dw_dtype;   // bfloat16 or float32
    const void* lhs;  // [R, M], or [T, M] if gathered; without slots in the plan neither side is
    const void* rhs;  // [R, N], or [T, N] if gathered
    int64_t lhs_stride, rhs_stride;
    int64_t m, n;
    bool gather_lhs;  // else rhs is gathered
    bool accumulate;  // the products are added to what dw holds
};

// Of the tiles that it takes, whether they are 256 columns of the gathered side by 192, and not 128 by 256.
bool grouped_wgrad_takes_tall(int64_t gathered_width, int64_t contiguous_width);

void grouped_wgrad(const GroupedWgradArguments& arguments, const Plan& plan, const Launch& launch);

}  // namespace moe_kernels
