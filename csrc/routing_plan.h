// routing_plan: see routing_plan.cu for the algorithm.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe_kernels {

constexpr int kMaxExperts = 4096;

// 32-bit words of scratch memory that routing_plan needs on a GPU of num_sms multiprocessors, maybe none; their
// contents on entry don't matter.
int64_t routing_plan_workspace(int64_t num_slots, int num_experts, int num_sms);

// indices [num_slots], of 8 or 4 bytes each; offsets [num_experts + 1]; slots and positions [num_slots];
// tiles [2, num_tiles]. All contiguous device memory; the workspace starts at a multiple of 16 bytes. num_sms must not
// be more than the device has: the blocks wait for each other.
void routing_plan(const void* indices, int index_bytes, int64_t num_slots, int num_experts, int block_m,
                  int64_t num_tiles, int num_sms, int* workspace, int* offsets, int* slots, int* positions, int* tiles,
                  cudaStream_t stream);

}  // namespace moe_kernels
