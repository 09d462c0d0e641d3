// The experts by their steps of a reduction over their rows, most first, equal ones as they come.
//
//     order[number of experts with more steps, or as many and a lower id] = expert
//
// Each thread counts for its experts, all keys (steps, then id) being different: O(E^2 / 96), without a barrier between
// steps of a sort.
#pragma once

#include "sm90/pipeline.cuh"

namespace moe_kernels {

constexpr int kMostSorted = 512;  // experts

// By all threads of a producer, before the first tile. Its first warp only meets the others: they are those that the
// consumers wait for before they use the same memory. `keys`: shared memory for kMostSorted words, 16-byte aligned, for
// the time of the call.
__device__ __forceinline__ void sort_experts(const int* offsets, int num_experts, uint32_t* keys, short* order,
                                             int thread) {
    constexpr int kBits = 9;  // of an expert
    static_assert(kMostSorted == 1 << kBits);
    const int first = thread < kWarpSize ? kMostSorted : thread - kWarpSize;
    for (int e = first; e < (num_experts + 3) / 4 * 4; e += kGatherThreads) {
        uint32_t key = 0;
        if (e < num_experts) {
            const int rows = __ldg(offsets + e + 1) - __ldg(offsets + e);
            const int steps = min((rows + kTileK - 1) / kTileK, (1 << (32 - kBits)) - 1);
            key = static_cast<uint32_t>(steps) << kBits | (kMostSorted - 1 - e);
        }
        keys[e] = key;
    }
    warpgroup_sync(kConsumers);
    for (int e = first; e < num_experts; e += kGatherThreads) {
        const uint32_t mine = keys[e];
        int before = 0;
        for (int other = 0; other < num_experts; other += 4) {
            const uint4 keys_of = *reinterpret_cast<const uint4*>(keys + other);
            before += (keys_of.x > mine) + (keys_of.y > mine) + (keys_of.z > mine) + (keys_of.w > mine);
        }
        order[before] = static_cast<short>(e);
    }
    warpgroup_sync(kConsumers);
}

}  // namespace moe_kernels
