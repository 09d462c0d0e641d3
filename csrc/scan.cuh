// Sums over lanes, over the threads of a block, and over the bytes of a word.
#pragma once

#include "common.cuh"

namespace moe_kernels {

__device__ __forceinline__ int warp_inclusive_sum(int value, int lane) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int below = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// Turns values[0..n) in shared memory into their exclusive sums. Called by the whole block of kThreads; thread i %
// kThreads has written value i, or a barrier lies between.
template <int kThreads>
__device__ void block_exclusive_sum(int* values, int n) {
    constexpr int kWarps = kThreads / kWarpSize;
    static_assert(kWarps <= kWarpSize, "one warp sums the warps' sums");
    __shared__ int warp_sums[kWarps];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;

    int carry = 0;
    for (int begin = 0; begin < n; begin += kThreads) {
        const int i = begin + threadIdx.x;
        const int value = i < n ? values[i] : 0;
        const int inclusive = warp_inclusive_sum(value, lane);
        if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
        __syncthreads();
        if (warp == 0) {
            const int sum = warp_inclusive_sum(lane < kWarps ? warp_sums[lane] : 0, lane);
            if (lane < kWarps) warp_sums[lane] = sum;
        }
        __syncthreads();
        if (i < n) values[i] = carry + (warp > 0 ? warp_sums[warp - 1] : 0) + inclusive - value;
        carry += warp_sums[kWarps - 1];
        __syncthreads();
    }
}

// Of the bytes that the masks leave.
__device__ __forceinline__ int sum_bytes(const uint4& bytes, const uint4& mask) {
    constexpr unsigned kOnes = 0x01010101u;
    unsigned sum = __dp4a(bytes.x & mask.x, kOnes, 0u);
    sum = __dp4a(bytes.y & mask.y, kOnes, sum);
    sum = __dp4a(bytes.z & mask.z, kOnes, sum);
    return static_cast<int>(__dp4a(bytes.w & mask.w, kOnes, sum));
}

__device__ __forceinline__ int sum_bytes(const uint4& bytes) {
    return sum_bytes(bytes, make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu));
}

// The lowest bytes of a word.
__device__ __forceinline__ unsigned low_bytes(int count) {
    return count <= 0 ? 0u : count >= 4 ? 0xffffffffu : (1u << (8 * count)) - 1;
}

}  // namespace moe_kernels
