// permute: see permute.cu for the algorithm.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace moe_kernels {

struct PermuteArguments {
    void* out;             // [R, D] contiguous, 16-byte aligned
    const void* x;         // [T, D], 16-byte aligned rows
    const void* weights;   // [T, K] contiguous, or null
    const int* offsets;    // [E+1]
    const int* positions;  // [T, K] contiguous
    int64_t x_stride;      // elements from one row to the next
    int64_t tokens;
    int top_k;
    int width;  // D, a multiple of 8
    int num_experts;
    DType dtype;  // of out and x
    DType weights_dtype;
};

void permute(const PermuteArguments& arguments, cudaStream_t stream);

}  // namespace moe_kernels
