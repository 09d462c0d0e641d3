// csrc/ptx/mma.cuh and wgmma.cuh.
#include <type_traits>

#include "harness.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"

namespace moe_kernels {
namespace {

// c [16, 8] += a [16, 16] . b [8, 16] transposed; a and b in pairs.
template <typename T>
__global__ void mma_kernel(float* c, const uint32_t* a, const uint32_t* b) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float* upper = c + g * 8 + 2 * t;
    float* lower = upper + 8 * 8;
    float sums[4] = {upper[0], upper[1], lower[0], lower[1]};
    const uint32_t *a_upper = a + g * 8 + t, *a_lower = a_upper + 8 * 8, *b_column = b + g * 8 + t;
    ptx::mma_16x8x16(sums, a_upper[0], a_lower[0], a_upper[4], a_lower[4], b_column[0], b_column[4],
                     static_cast<const T*>(nullptr));
    upper[0] = sums[0];
    upper[1] = sums[1];
    lower[0] = sums[2];
    lower[1] = sums[3];
}

template <int kN>
constexpr int kStepBytes = kChunkBytes + kN * kRowBytes;  // 64 rows of A, kN columns of B

// c [64, kN] = (accumulate: c +) the products of `steps` steps of 64, from two stages that are used in turn. Rows of
// 64 elements: a [steps, 64] and b [steps, kN] as they lie in shared memory, along or across the reduction.
template <typename T, int kN, int kAcrossA, int kAcrossB>
__global__ void __launch_bounds__(kWarpgroup, 1)
    wgmma_kernel(float* c, const uint4* a, const uint4* b, int steps, bool accumulate) {
    using Product = ptx::Wgmma<T, kN, kAcrossA, kAcrossB>;
    extern __shared__ unsigned char memory[];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    // Of accumulators 4j and 4j + 1; the next two are eight rows below.
    auto at = [&](int j) { return c + (16 * warp + lane / 4) * kN + 8 * j + 2 * (lane % 4); };
    float acc[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = at(i / 4)[i / 2 % 2 * 8 * kN + i % 2];
    for (int k = 0; k < steps; ++k) {
        unsigned char* stage_a = aligned(memory) + k % 2 * kStepBytes<kN>;
        unsigned char* stage_b = stage_a + kChunkBytes;
        fill_box(stage_a, a + k * 64 * 8, 64);
        fill_box(stage_b, b + k * kN * 8, kN);
        ptx::fence_async_proxy();
        __syncthreads();
        const uint64_t desc_a =
            kAcrossA ? ptx::descriptor_across(stage_a, kChunkBytes) : ptx::descriptor_along(stage_a);
        const uint64_t desc_b =
            kAcrossB ? ptx::descriptor_across(stage_b, kChunkBytes) : ptx::descriptor_along(stage_b);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Product::run(acc, desc_a + i * (kAcrossA ? ptx::kNextAcross : ptx::kNextAlong),
                         desc_b + i * (kAcrossB ? ptx::kNextAcross : ptx::kNextAlong), accumulate || (k | i) != 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the step before this one has read its stage
        __syncthreads();
    }
    ptx::wgmma_wait_all(acc);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) at(i / 4)[i / 2 % 2 * 8 * kN + i % 2] = acc[i];
}

}  // namespace

extern "C" {

const char* mma(float* c, const uint32_t* a, const uint32_t* b, int half, cudaStream_t stream) {
    return run(half ? mma_kernel<__half> : mma_kernel<__nv_bfloat16>, 1, kWarpSize, 0, stream, c, a, b);
}

const char* wgmma(float* c, const uint4* a, const uint4* b, int steps, int accumulate, int across_a, int across_b,
                  int width, int half, cudaStream_t stream) {
    const auto run_type = [&](auto type, auto of) {
        using T = decltype(type);
        constexpr int kN = decltype(of)::value;
        const auto kernel = across_a   ? across_b ? wgmma_kernel<T, kN, 1, 1> : wgmma_kernel<T, kN, 1, 0>
                            : across_b ? wgmma_kernel<T, kN, 0, 1>
                                       : wgmma_kernel<T, kN, 0, 0>;
        return run(kernel, 1, kWarpgroup, kAlignment + 2 * kStepBytes<kN>, stream, c, a, b, steps, accumulate != 0);
    };
    const auto run_width = [&](auto of) { return half ? run_type(__half(), of) : run_type(__nv_bfloat16(), of); };
    switch (width) {
        case 192: return run_width(std::integral_constant<int, 192>{});
        case 208: return run_width(std::integral_constant<int, 208>{});
        case 256: return run_width(std::integral_constant<int, 256>{});
        default: return "no product of this width";
    }
}

}  // extern "C"

}  // namespace moe_kernels
