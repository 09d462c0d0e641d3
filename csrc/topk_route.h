// topk_route: see topk_route.cu for the algorithm.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace moe_kernels {

enum class Scoring : int { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

// How scores become weights, in both directions.
struct RouteRule {
    Scoring scoring;
    bool after;  // score only the chosen
    bool renormalize;
    float epsilon, scale, min_sum, soft_cap;
    DType step;  // to which every step is rounded; kFloat32: none is
};

// Rows of logits, like the bias, start at a multiple of four elements and can be read to one.
struct RouteArguments {
    void* weights;          // [T, K] contiguous
    int64_t* indices;       // [T, K] contiguous
    const void* logits;     // [T, E]
    const void* bias;       // [E], or null
    int64_t logits_stride;  // elements from one row to the next
    int64_t tokens;
    int num_experts, top_k;
    int num_groups, top_groups;
    bool group_max;    // a group is as good as its best expert, not as the sum of its two best
    bool losers_zero;  // experts of other groups have a choice of 0; without a bias they are out nevertheless
    DType logits_dtype, bias_dtype, weights_dtype;
    DType step_choice;  // to which score + bias is rounded
    RouteRule rule;
};

void topk_route(const RouteArguments& arguments, cudaStream_t stream);

}  // namespace moe_kernels
