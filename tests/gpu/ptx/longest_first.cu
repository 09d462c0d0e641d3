// csrc/sm90/longest_first.cuh.
#include "harness.cuh"
#include "sm90/longest_first.cuh"

namespace moe_kernels {
namespace {

// offsets [E + 1] -> order [E], by a producer alone; -1 for a place that is not written.
__global__ void longest_first_kernel(int* order, const int* offsets, int num_experts) {
    __shared__ __align__(16) uint32_t keys[kMostSorted];
    __shared__ short experts[kMostSorted];
    for (int i = threadIdx.x; i < kMostSorted; i += blockDim.x) {
        keys[i] = ~0u;  // longer than any expert
        experts[i] = -1;
    }
    __syncthreads();
    sort_experts(offsets, num_experts, keys, experts, threadIdx.x);
    for (int i = threadIdx.x; i < num_experts; i += blockDim.x) order[i] = experts[i];
}

}  // namespace

extern "C" {

const char* longest_first(int* order, const int* offsets, int num_experts, cudaStream_t stream) {
    return run(longest_first_kernel, 1, kWarpgroup, 0, stream, order, offsets, num_experts);
}

}  // extern "C"

}  // namespace moe_kernels
