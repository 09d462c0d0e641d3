// What the Hopper kernels share: the shape of a tile, the ring of stages between the producer and the consumers, the
// ring of tiles between the thread that draws them and everybody else.
#pragma once

#include "common.cuh"
#include "ptx/cluster.cuh"
#include "ptx/copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"

namespace moe_kernels {

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kTileK = 64;
constexpr int kConsumers = 2;               // warpgroups
constexpr int kWarpgroup = 128;             // threads
constexpr int kRows = kTileM / kConsumers;  // of a consumer
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kCluster = 2;  // blocks

constexpr int kRowBytes = 128;  // 64 elements, the swizzle's width
constexpr int kABytes = kTileM * kRowBytes;
constexpr int kBBytes = kTileN * kRowBytes;
constexpr int kStageBytes = kABytes + kBBytes;  // 48 KB
constexpr int kChunkBytes = kRows * kRowBytes;  // 64 rows x 64 columns of results, 8 KB
constexpr int kAlignment = 1024;                // the swizzle's period
constexpr int kRingBytes = 512;                 // tiles and barriers

// Shared memory of a block, whose start need not be aligned.
constexpr int shared_bytes(int stages, int staging) { return kAlignment + stages * kStageBytes + staging + kRingBytes; }

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

// The threads of one warpgroup meet; ids 1 and 2, 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int consumer) {
    asm volatile("bar.sync %0, %1;" ::"r"(consumer + 1), "n"(kWarpgroup) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
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
constexpr int kStop = -2;     // the expert of the tile after the last
constexpr int kTileRing = 8;  // more than tiles can be in flight: each has a step at least, and there are fewer stages

template <typename Tile>
struct TileRing {
    alignas(16) Tile tiles[kTileRing];
    uint64_t ready[kTileRing];

    __device__ __forceinline__ void init() {
        for (int i = 0; i < kTileRing; ++i) ptx::mbarrier_init(ready + i, 1);
    }

    // One thread of each block, some time: its j-th tile will come.
    __device__ __forceinline__ void expect(int j) { ptx::mbarrier_arrive_expect(ready + j % kTileRing, sizeof(Tile)); }

    // The drawing thread: the j-th tile of block `rank`.
    __device__ __forceinline__ void publish(int j, const Tile& tile, int rank) {
        static_assert(sizeof(Tile) == sizeof(int4));
        ptx::store_async_in(tiles + j % kTileRing, ready + j % kTileRing, rank, *reinterpret_cast<const int4*>(&tile));
    }

    // The j-th tile of this block.
    __device__ __forceinline__ Tile wait(int j) {
        ptx::mbarrier_wait(ready + j % kTileRing, j / kTileRing & 1);
        return tiles[j % kTileRing];
    }
};

// At the start of a kernel, by all threads. A full barrier expects `copies` arrivals, an empty one those of all
// consumer warps of the cluster.
template <int kStages, typename Tile>
__device__ __forceinline__ void init_rings(TileRing<Tile>& tiles, uint64_t* full, uint64_t* empty, int copies) {
    static_assert(sizeof(TileRing<Tile>) + 2 * kStages * sizeof(uint64_t) <= kRingBytes);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(full + s, copies);
            ptx::mbarrier_init(empty + s, kCluster * kConsumers * kWarpgroup / kWarpSize);
        }
        tiles.init();
        ptx::mbarrier_init_fence();
    }
    ptx::cluster_sync();
}

}  // namespace moe_kernels
