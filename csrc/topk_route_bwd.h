// topk_route_bwd: see topk_route_bwd.cu for the algorithm.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "topk_route.h"

namespace moe_kernels {

struct RouteBackwardArguments {
    void* d_logits;          // [T, E], rows that start at a multiple of four elements and can be written to one
    const void* d_weights;   // [T, K] contiguous
    const void* logits;      // [T, E], likewise
    const int64_t* indices;  // [T, K] contiguous, distinct in a row; outside 0..E-1: no expert
    int64_t d_logits_stride, logits_stride;
    int64_t tokens;
    int num_experts, top_k;
    DType logits_dtype, d_weights_dtype;  // d_logits are of the type of the logits
    RouteRule rule;
};

void topk_route_bwd(const RouteBackwardArguments& arguments, cudaStream_t stream);

}  // namespace moe_kernels
