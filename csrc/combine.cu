// combine: the weighted sum of every token's K expert rows, in float32, k ascending.
//
//     out[t, :] = residual[t, :] + sum_k weights[t, k] * y[positions[t, k], :]        out [T, D], y [R, D], R = T * K
//
// Memory-bound: R rows are read once and T rows written, so all that counts is bytes in flight. A thread owns 16 bytes
// of one token's row and issues the loads of all K expert rows before the first addition; a block is 256 threads over
// as many tokens as it takes. The order of the sum is fixed, so reruns are bitwise equal; no two threads share an
// output. A dropped slot (position -1) is not read: its row may never have been written.

#include "combine.h"
#include "common.cuh"
#include "routing_weight.cuh"
#include "token_rows.cuh"

namespace moe_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;  // rows in flight where K is not one of the compiled values

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

// kTopK 0 takes any K, kGroup rows at a time.
template <typename T, int kTopK>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineArguments a) {
    constexpr int kWidth = Vector<T>::kWidth;
    constexpr int kRows = kTopK > 0 ? kTopK : kGroup;
    const int top_k = kTopK > 0 ? kTopK : a.top_k;

    const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t column = static_cast<int64_t>(blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
    if (t >= a.tokens || column >= a.width) return;

    const T* y = static_cast<const T*>(a.y) + column;
    uint4 residual = make_uint4(0, 0, 0, 0);  // the bits of zeros in every dtype
    if (a.residual != nullptr) {
        const T* row = static_cast<const T*>(a.residual) + t * a.residual_stride + column;
        residual = *reinterpret_cast<const uint4*>(row);
    }

    float total[kWidth];
    bool started = false;
    for (int k = 0; k < top_k; k += kRows) {
        int position[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            position[i] = kTopK > 0 || k + i < top_k ? a.positions[t * top_k + k + i] : -1;
        }

        // Expert rows are read once: evict them first, they'd push out what the next kernel wants.
        uint4 bits[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            bits[i] = make_uint4(0, 0, 0, 0);
            if (position[i] >= 0) bits[i] = __ldcs(reinterpret_cast<const uint4*>(y + position[i] * a.y_stride));
        }

        float weight[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            weight[i] = position[i] >= 0 ? load_weight(a.weights, a.weights_dtype, t * top_k + k + i) : 0.0f;
        }

        if (!started) unpack(residual, total, y);
        started = true;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float value[kWidth];
            unpack(bits[i], value, y);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) total[j] = fmaf(weight[i], value[j], total[j]);
        }
    }
    if (!started) unpack(residual, total, y);

    T* out = static_cast<T*>(a.out) + t * a.out_stride + column;
    *reinterpret_cast<uint4*>(out) = pack(total, y);
}

}  // namespace

void combine(const CombineArguments& a, cudaStream_t stream) {
    if (a.tokens == 0 || a.width == 0) return;
    const Needs needs{"combine"};
    const int element_bytes = a.dtype == DType::kFloat32 ? 4 : 2;
    needs.multiple("width", a.width, 8);
    require(a.top_k >= 0, "combine: top_k must not be negative, got ", a.top_k);
    needs.rows("out", a.out, a.out_stride, a.tokens, element_bytes);
    needs.rows("y", a.y, a.y_stride, a.tokens * a.top_k, element_bytes);
    if (a.residual != nullptr) needs.rows("residual", a.residual, a.residual_stride, a.tokens, element_bytes);
    if (a.top_k > 0) {
        needs.present("positions", a.positions);
        require_weights(needs, a.weights, a.weights_dtype);
    }
    launch_token_rows<kThreads>("combine", a, [&](auto element, auto top_k, dim3 grid, dim3 block) {
        combine_kernel<decltype(element), decltype(top_k)::value><<<grid, block, 0, stream>>>(a);
        check_launch("combine_kernel");
    });
}

}  // namespace moe_kernels
