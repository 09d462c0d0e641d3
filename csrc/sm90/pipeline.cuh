// What the Hopper kernels share: the ring of stages between the producer and the consumers, the ring of tiles between
// the thread that draws them and everybody else, the launch.
//
// The producer is a warpgroup. One thread of its first warp draws tiles (one of its second where consumers take turns)
// and gives the copy engine its work; where rows are gathered the other three warps do that. So neither waits for the
// other: weights and chunks of H are asked for as soon as their stage is free, in both blocks of a cluster, which share
// them.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "launch.h"
#include "ptx/cluster.cuh"
#include "ptx/copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/registers.cuh"
#include "tile.h"

namespace moe_kernels {

constexpr int kConsumers = 2;               // warpgroups
constexpr int kWarpgroup = 128;             // threads
constexpr int kRows = kTileM / kConsumers;  // of a consumer
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kLaunchRegisters = 65536 / kBlockThreads / 8 * 8;  // of a thread, before any are given or taken
constexpr int kCluster = 2;                                      // blocks
constexpr int kGatherWarps = 3, kGatherThreads = kGatherWarps * kWarpSize;  // of the producer's four warps
constexpr int kGatherRows = kGatherThreads / 8;                             // at a time, a thread has 16 bytes of one
constexpr uint16_t kBothBlocks = (1 << kCluster) - 1;                       // a bit each

constexpr int kRowBytes = 128;  // 64 elements, the swizzle's width
constexpr int kABytes = kTileM * kRowBytes;
constexpr int kBBytes = kTileN * kRowBytes;
constexpr int kStageBytes = kABytes + kBBytes;  // 48 KB
constexpr int kChunkBytes = 64 * kRowBytes;     // 64 rows x 64 columns of an operand or of results, 8 KB
static_assert(kRows == 64 && kTileK == 64,
              "a chunk is a consumer's rows of A, or a step of an operand that lies across");
constexpr int kAlignment = 1024;  // the swizzle's period
constexpr int kRingBytes = 512;   // tiles and barriers

// Shared memory of a block, whose start need not be aligned.
constexpr int shared_bytes(int stages, int staging, int stage_bytes = kStageBytes) {
    return kAlignment + stages * stage_bytes + staging + kRingBytes;
}

__device__ __forceinline__ unsigned char* aligned(unsigned char* memory) {
    return memory + (-ptx::shared_address(memory) & (kAlignment - 1));
}

// Byte of 16-byte piece `piece` of row `row` inside a swizzled block of 128-byte rows.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
    return row * kRowBytes + ((piece ^ (row & 7)) << 4);
}

// Division by an invariant: n / d = high word of n * (2^32 / d, rounded up), or one less, for 0 <= n < 2^31.
struct Divisor {
    uint32_t d, inverse;
    __device__ __forceinline__ int divide(int n) const {
        const uint32_t quotient = __umulhi(n, inverse);
        return d == 1 ? n : static_cast<int>(quotient - (quotient * d > static_cast<uint32_t>(n)));
    }
};

inline Divisor divisor(int d) {
    return {static_cast<uint32_t>(d), static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d)};
}

// What is the same in all lanes of a warp, so that the compiler knows it, too: what follows from it is worked out once
// a warp, in uniform registers, where wgmma and the copy engine want their operands. So that it dares to, branches
// around them have to be known as the warp's: all_lanes() of the condition.
__device__ __forceinline__ int uniform(int of_warp) { return __shfl_sync(kFullWarp, of_warp, 0); }
__device__ __forceinline__ bool all_lanes(bool of_warp) { return __all_sync(kFullWarp, of_warp); }

// The threads of one warpgroup meet: a consumer, or as number kConsumers the producer. 0 is the id of __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int consumer) {
    asm volatile("bar.sync %0, %1;" ::"r"(consumer + 1), "n"(kWarpgroup) : "memory");
}

// Position in the ring of stages, and the parity of its current phase.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Which tiles come next: pairs of blocks (clusters) draw numbers from a counter, so that they work side by side on
// neighbouring tiles, which share weights and rows in L2, however unequal the tiles are. One thread of the first block
// draws, while it fills the stages of the tile before: a number, the tile map's entries and the experts' ends are three
// dependent loads, spread over that tile's steps so that nobody waits for them. It then puts both blocks' tiles into a
// ring in their shared memory.
constexpr int kStop = -2;  // the expert of the tile after the last
constexpr int kTileRing = 8;

// A cluster's first number is its own; the counter goes on after those.
__device__ __forceinline__ int first_number() { return blockIdx.x / kCluster; }
__device__ __forceinline__ int draw_number(int* counter) { return atomicAdd(counter, 1) + gridDim.x / kCluster; }

template <typename Tile>
struct TileRing {
    alignas(16) Tile tiles[kTileRing];
    uint64_t ready[kTileRing];

    __device__ __forceinline__ void init() {
        for (int i = 0; i < kTileRing; ++i) ptx::mbarrier_init(ready + i, 1);
    }

    // One thread of each block, some time: its j-th tile will come.
    __device__ __forceinline__ void expect(int j) { ptx::mbarrier_arrive_expect(ready + j % kTileRing, sizeof(Tile)); }

    // The drawing thread: the j-th tile of each block.
    __device__ __forceinline__ void publish(int j, const Tile& first, const Tile& second) {
        static_assert(sizeof(Tile) == sizeof(int4) && kCluster == 2);
        put(j, first, 0);
        put(j, second, 1);
    }

    // The j-th tile of this block.
    __device__ __forceinline__ Tile wait(int j) {
        ptx::mbarrier_wait(ready + j % kTileRing, j / kTileRing & 1);
        return tiles[j % kTileRing];
    }

  private:
    __device__ __forceinline__ void put(int j, const Tile& tile, int rank) {
        ptx::store_async_in(tiles + j % kTileRing, ready + j % kTileRing, rank, *reinterpret_cast<const int4*>(&tile));
    }
};

// A block's shared memory, as both sides see it.
template <int kStages, typename Tile>
struct Shared {
    unsigned char* stages;   // A, then B
    unsigned char* staging;  // of results
    TileRing<Tile>& tiles;
    uint64_t* full;   // per stage: its copies have landed
    uint64_t* empty;  // per stage: all consumers of the cluster that take it are done with it
    uint64_t* own;    // the kernel's own

    // One lane of each warp of a consumer. To both producers: either one's copies may fill the stage next.
    __device__ __forceinline__ void give_back(int stage) const {
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) ptx::mbarrier_arrive_in(empty + stage, rank);
    }
};

// At the start of a kernel, by all threads; kBytesOfStage: of A and B. A full barrier expects `copies` arrivals, an
// empty one those of all warps of as many consumers in each block as take a stage, each of the kernel's own those of a
// warpgroup's warps.
template <int kStages, int kStagingBytes, typename Tile, int kBytesOfStage = kStageBytes, int kTakers = kConsumers,
          int kOwn = 0>
__device__ __forceinline__ Shared<kStages, Tile> init_shared(unsigned char* memory, int copies) {
    static_assert(sizeof(TileRing<Tile>) + (2 * kStages + kOwn) * sizeof(uint64_t) <= kRingBytes);
    static_assert(kBytesOfStage % kAlignment == 0);
    // Tile j + 1 is published in a step of tile j, when the cluster's consumers are known to have finished the step
    // that lies kStages + 1 steps back. A tile has one step at least, so they have read tile j - kStages - 1, and the
    // kStages + 2 tiles after that one, up to j + 1, need a place each.
    static_assert(kStages + 2 <= kTileRing);
    unsigned char* stages = aligned(memory);
    unsigned char* staging = stages + kStages * kBytesOfStage;
    auto& tiles = *reinterpret_cast<TileRing<Tile>*>(staging + kStagingBytes);
    uint64_t* full = reinterpret_cast<uint64_t*>(&tiles + 1);
    uint64_t* empty = full + kStages;
    uint64_t* own = empty + kStages;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(full + s, copies);
            ptx::mbarrier_init(empty + s, kCluster * kTakers * kWarpgroup / kWarpSize);
        }
        for (int i = 0; i < kOwn; ++i) ptx::mbarrier_init(own + i, kWarpgroup / kWarpSize);
        tiles.init();
        ptx::mbarrier_init_fence();
    }
    ptx::cluster_sync();
    return {stages, staging, tiles, full, empty, own};
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

// A block a multiprocessor, for a kernel whose clusters draw `num_draws` numbers.
template <int kStages, int kStagingBytes, int kBytesOfStage = kStageBytes, typename... Parameters>
void launch_clusters(const char* name, void (*kernel)(Parameters...), int64_t num_draws, const Launch& launch,
                     const Parameters&... arguments) {
    constexpr int kBytes = shared_bytes(kStages, kStagingBytes, kBytesOfStage);
    static_assert(kBytes <= 227 * 1024, "more shared memory than a block can have");
    require(launch.counter != nullptr, name, ": counter must not be null");
    require(launch.num_sms >= kCluster, name, ": num_sms must be at least ", kCluster, ", got ", launch.num_sms);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "shared memory");
    const int blocks = kCluster * static_cast<int>(std::min<int64_t>(launch.num_sms / kCluster, num_draws));
    check(cudaMemsetAsync(launch.counter, 0, sizeof(int), launch.stream), "clear the counter of tiles");
    kernel<<<blocks, kBlockThreads, kBytes, launch.stream>>>(arguments...);
    check_launch(name);
}

}  // namespace moe_kernels
