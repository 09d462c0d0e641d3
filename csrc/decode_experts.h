// decode_experts: see decode_experts.cu for the algorithm.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "weights.h"

namespace moe_kernels {

constexpr int kMostDecodeRows = 2048;  // R: an expert's rows are listed in shared memory

struct DecodeArguments {
    void* out;                    // [T, D] contiguous
    void* a;                      // scratch [R, I]
    void* y;                      // scratch [R, D]
    const void* x;                // [T, D] contiguous
    const void* indices;          // [T, K] contiguous, int64 or int32; outside 0..E-1: no expert
    const void* routing_weights;  // [T, K] contiguous
    Weights gate_up;              // [E, 2I or I, D]; gate rows before up rows, or in turn
    Weights down;                 // [E, D, I]
    const void* bias_gate_up;     // [E, 2I or I] contiguous, or null
    const void* bias_down;        // [E, D] contiguous, or null
    int tokens, top_k, num_experts, hidden, inner;
    int index_bytes;
    DType dtype;  // bfloat16 or float16, of all but the routing weights
    DType routing_weights_dtype;
    Activation activation;
    float alpha, limit;  // of the clamped activations
    bool interleaved;    // gate and up rows, and the elements of their bias, come in turn
};

void decode_experts(const DecodeArguments& arguments, int num_sms, cudaStream_t stream);

}  // namespace moe_kernels
