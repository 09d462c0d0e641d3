// combine: see combine.cu for the algorithm.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace moe_kernels {

struct CombineArguments {
    void* out;             // [T, D], 16-byte aligned rows
    const void* y;         // [R, D], likewise
    const int* positions;  // [T, K] contiguous
    const void* weights;   // [T, K] contiguous, or null
    const void* residual;  // [T, D] like out, or null
    int64_t out_stride;    // elements from one row to the next
    int64_t y_stride;
    int64_t residual_stride;
    int64_t tokens;
    int top_k;
    int width;    // D, a multiple of 8
    DType dtype;  // of out, y and residual
    DType weights_dtype;
};

void combine(const CombineArguments& arguments, cudaStream_t stream);

}  // namespace moe_kernels
