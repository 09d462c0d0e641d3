// row_sums, a part of grouped_wgrad: see row_sums.cu. Rows are bfloat16, 16-byte aligned, their width a multiple of 8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"
#include "plan.h"

namespace moe_kernels {

// float32 words of scratch memory.
int64_t row_sums_workspace(int64_t num_rows, int num_experts, int64_t width);

struct RowSumsArguments {
    void* sums;        // [E, M] contiguous
    DType sums_dtype;  // bfloat16 or float32
    const void* rows;  // [T, M] if the plan has slots, else [R, M]
    int64_t row_stride;
    int64_t width;  // M
    float* workspace;
};

void row_sums(const RowSumsArguments& arguments, const Plan& plan, cudaStream_t stream);

}  // namespace moe_kernels
