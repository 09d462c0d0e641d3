// A consumer's main loop.
#pragma once

#include "ptx/wgmma.cuh"
#include "sm90/pipeline.cuh"

namespace moe_kernels {

// An operand in shared memory and the way to its next 16 of the reduction.
template <bool kAcross>
struct Operand {
    static constexpr uint64_t kNext = kAcross ? ptx::kNextAcross : ptx::kNextAlong;

    static __device__ __forceinline__ uint64_t descriptor(const unsigned char* at) {
        return kAcross ? ptx::descriptor_across(at, kChunkBytes) : ptx::descriptor_along(at);
    }
};

// acc = the products of `steps` stages from the ring's position on; each goes back when it has been read. A consumer
// has kBlocks blocks of 64 rows of A, and makes them by 2 * kSize columns of B. kAcross: how A and B are stored, see
// wgmma.cuh. kCpAsync: cp.async had part in filling the stages. before_step(k) is called in every step.
template <typename T, bool kAcrossA, bool kAcrossB, bool kCpAsync, int kBlocks, int kSize, int kStages, typename Tile,
          typename BeforeStep>
__device__ __forceinline__ void multiply(float (&acc)[kBlocks][kSize], const Shared<kStages, Tile>& shared,
                                         Ring<kStages>& ring, int steps, int consumer, bool first_lane,
                                         BeforeStep before_step) {
    constexpr int kBytesOfA = kConsumers * kBlocks * kChunkBytes, kN = 2 * kSize;
    constexpr int kBytesOfStage = kBytesOfA + kN * kRowBytes;
    int before = 0;
    for (int k = 0; k < steps; ++k, ring.advance()) {
        before_step(k);
        const unsigned char* a = shared.stages + ring.stage * kBytesOfStage;
        ptx::mbarrier_wait(shared.full + ring.stage, ring.parity);
        if (kCpAsync) ptx::fence_async_proxy();
        const uint64_t desc_a = Operand<kAcrossA>::descriptor(a + consumer * kBlocks * kChunkBytes);
        const uint64_t desc_b = Operand<kAcrossB>::descriptor(a + kBytesOfA);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTileK / 16; ++i) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                ptx::Wgmma<T, kN, kAcrossA, kAcrossB>::run(
                    acc[block], desc_a + i * Operand<kAcrossA>::kNext + block * (kChunkBytes >> 4),
                    desc_b + i * Operand<kAcrossB>::kNext, (k | i) != 0);
            }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the step before this one has read its operands
        if (k > 0 && first_lane) shared.give_back(before);
        before = ring.stage;
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) ptx::wgmma_wait_all(acc[block]);
    if (first_lane) shared.give_back(before);
}

}  // namespace moe_kernels
