// routing_plan: expert indices -> a stable counting sort of the slots by expert, and the map of its tiles.
//
//     bucket[r]    = indices[r] if 0 <= indices[r] < E else E            r in 0..R, the slots; bucket E is "dropped"
//     offsets[e]   = number of slots in buckets below e                  [E+1]
//     row[r]       = offsets[bucket[r]] + |{r' < r : bucket[r'] = bucket[r]}|
//     slots[row[r]] = r                                                  [R]
//     positions[r] = row[r], or -1 in bucket E                           [R]
//     tiles        = per block_m rows of an expert: the expert, its first row; (-1, 0) past the last tile   [2, M]
//
// R is cut into at most kMaxChunks chunks of whole sub-chunks of kThreads slots, one thread block a chunk:
//
//     count    every chunk's histogram over the buckets                          counts[E+1][chunks]
//     prefix   one warp a bucket: exclusive sum over the chunks, in place; its total
//     scatter  every block scans the totals for itself (E+1 words, cheaper than a launch), adds its chunk's prefix,
//              and gives each sub-chunk's slots their rows. Blocks past the chunks write offsets and tiles.
//
// The rank among equals inside a sub-chunk is what must be stable: lanes below it in the warp from __match_any_sync,
// warps below it by taking turns on one shared counter per bucket. Turns cost a barrier each but only E+1 words, where
// a counter per warp and bucket would not fit in shared memory for thousands of experts.
//
// Atomics only count, so their order can't show; nothing is read back to the host; the grid depends on shapes alone.

#include "common.cuh"
#include "routing_plan.h"

namespace moe_kernels {
namespace {

constexpr int kThreads = 1024;  // also the slots of a sub-chunk
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxChunks = 1024;     // bounds the workspace: (E+1) * kMaxChunks words
constexpr int kPrefixThreads = 256;  // eight buckets a block

struct Chunks {
    int count;
    int64_t slots;  // per chunk, a multiple of kThreads
};

Chunks chunks_of(int64_t num_slots) {
    const int64_t wanted = ceil_div(num_slots, kThreads);
    const int64_t sub_chunks = wanted <= kMaxChunks ? 1 : ceil_div(wanted, kMaxChunks);
    return {static_cast<int>(ceil_div(wanted, sub_chunks)), sub_chunks * kThreads};
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

template <typename Index>
__device__ __forceinline__ int bucket_of(Index index, int num_experts) {
    return index >= 0 && index < num_experts ? static_cast<int>(index) : num_experts;
}

__device__ __forceinline__ int warp_inclusive_sum(int value, int lane) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int below = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// Turns values[0..n) in shared memory into their exclusive sums. Called by the whole block of kThreads.
__device__ void block_exclusive_sum(int* values, int n) {
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
        if (warp == 0) warp_sums[lane] = warp_inclusive_sum(warp_sums[lane], lane);
        __syncthreads();
        if (i < n) values[i] = carry + (warp > 0 ? warp_sums[warp - 1] : 0) + inclusive - value;
        carry += warp_sums[kWarps - 1];
        __syncthreads();
    }
}

template <typename Index>
__global__ void __launch_bounds__(kThreads)
    routing_plan_count_kernel(const Index* __restrict__ indices_R, int64_t num_slots, int num_experts,
                              int64_t slots_per_chunk, int* __restrict__ counts) {
    extern __shared__ int histogram[];  // [E+1]
    for (int e = threadIdx.x; e <= num_experts; e += kThreads) histogram[e] = 0;
    __syncthreads();

    const int64_t begin = blockIdx.x * slots_per_chunk;
    const int64_t end = min(begin + slots_per_chunk, num_slots);
    for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
        atomicAdd(&histogram[bucket_of(indices_R[r], num_experts)], 1);
    }
    __syncthreads();

    for (int e = threadIdx.x; e <= num_experts; e += kThreads) {
        counts[static_cast<int64_t>(e) * gridDim.x + blockIdx.x] = histogram[e];
    }
}

__global__ void __launch_bounds__(kPrefixThreads)
    routing_plan_prefix_kernel(int* __restrict__ counts, int* __restrict__ totals, int num_experts, int num_chunks) {
    const int lane = threadIdx.x % kWarpSize;
    const int bucket = (blockIdx.x * kPrefixThreads + threadIdx.x) / kWarpSize;
    if (bucket > num_experts) return;

    int* row = counts + static_cast<int64_t>(bucket) * num_chunks;
    int carry = 0;
    for (int begin = 0; begin < num_chunks; begin += kWarpSize) {
        const int chunk = begin + lane;
        const int value = chunk < num_chunks ? row[chunk] : 0;
        const int inclusive = warp_inclusive_sum(value, lane);
        if (chunk < num_chunks) row[chunk] = carry + inclusive - value;
        carry += __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    }
    if (lane == 0) totals[bucket] = carry;
}

// next_E1 holds the row of each bucket's next slot; on return, the chunk's slots have theirs.
template <typename Index>
__device__ void scatter_chunk(const Index* __restrict__ indices_R, int64_t begin, int64_t end, int num_experts,
                              int* next_E1, int* __restrict__ slots_R, int* __restrict__ positions_R) {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;

    for (; begin < end; begin += kThreads) {
        const int64_t r = begin + threadIdx.x;
        const bool live = r < end;
        const int bucket = live ? bucket_of(indices_R[r], num_experts) : -1;
        const unsigned equals = __match_any_sync(kFullWarp, bucket);
        const int leader = __ffs(equals) - 1;
        const int rank = __popc(equals & ((1u << lane) - 1));

        int row = 0;
        for (int turn = 0; turn < kWarps; ++turn) {
            if (turn == warp && live && lane == leader) {
                row = next_E1[bucket];
                next_E1[bucket] = row + __popc(equals);
            }
            __syncthreads();
        }
        row = __shfl_sync(kFullWarp, row, leader) + rank;

        if (live) {
            slots_R[row] = static_cast<int>(r);
            positions_R[r] = bucket < num_experts ? row : -1;
        }
    }
}

// One thread a tile: the expert whose range of tiles holds it.
__device__ void write_tiles(int64_t tile, int64_t num_tiles, const int* offsets_E1, const int* first_tile_E1,
                            int num_experts, int block_m, int* __restrict__ tiles_2M) {
    if (tile >= num_tiles) return;
    int expert = -1;
    int row = 0;
    if (tile < first_tile_E1[num_experts]) {
        int low = 0;  // the last expert that starts at or before the tile; an empty one shares its start with the next
        int high = num_experts;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (first_tile_E1[middle] <= tile ? low : high) = middle;
        }
        expert = low;
        row = offsets_E1[low] + static_cast<int>(tile - first_tile_E1[low]) * block_m;
    }
    tiles_2M[tile] = expert;
    tiles_2M[num_tiles + tile] = row;
}

template <typename Index>
__global__ void __launch_bounds__(kThreads)
    routing_plan_scatter_kernel(const Index* __restrict__ indices_R, int64_t num_slots, int num_experts, int block_m,
                                int num_chunks, int64_t slots_per_chunk, int64_t num_tiles,
                                const int* __restrict__ prefixes, const int* __restrict__ totals,
                                int* __restrict__ offsets_out, int* __restrict__ slots_R, int* __restrict__ positions_R,
                                int* __restrict__ tiles_2M) {
    extern __shared__ int shared[];
    int* offsets_E1 = shared;
    for (int e = threadIdx.x; e <= num_experts; e += kThreads) offsets_E1[e] = totals[e];
    __syncthreads();
    block_exclusive_sum(offsets_E1, num_experts + 1);

    const int chunk = blockIdx.x;
    if (chunk < num_chunks) {
        for (int e = threadIdx.x; e <= num_experts; e += kThreads) {
            offsets_E1[e] += prefixes[static_cast<int64_t>(e) * num_chunks + chunk];
        }
        __syncthreads();
        const int64_t begin = chunk * slots_per_chunk;
        scatter_chunk(indices_R, begin, min(begin + slots_per_chunk, num_slots), num_experts, offsets_E1, slots_R,
                      positions_R);
        return;
    }

    int* first_tile_E1 = shared + num_experts + 1;
    for (int e = threadIdx.x; e <= num_experts; e += kThreads) {
        first_tile_E1[e] = e < num_experts ? (totals[e] + block_m - 1) / block_m : 0;
        if (chunk == num_chunks) offsets_out[e] = offsets_E1[e];
    }
    __syncthreads();
    block_exclusive_sum(first_tile_E1, num_experts + 1);
    const int64_t tile = static_cast<int64_t>(chunk - num_chunks) * kThreads + threadIdx.x;
    write_tiles(tile, num_tiles, offsets_E1, first_tile_E1, num_experts, block_m, tiles_2M);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <typename Index>
void launch(const Index* indices, int64_t num_slots, int num_experts, int block_m, int64_t num_tiles, int* workspace,
            int* offsets, int* slots, int* positions, int* tiles, cudaStream_t stream) {
    const Chunks chunks = chunks_of(num_slots);
    const int buckets = num_experts + 1;
    int* totals = workspace;
    int* counts = workspace + buckets;

    if (chunks.count > 0) {
        routing_plan_count_kernel<<<chunks.count, kThreads, buckets * sizeof(int), stream>>>(
            indices, num_slots, num_experts, chunks.slots, counts);
        check_launch("routing_plan_count_kernel");
    }

    const int prefix_blocks = static_cast<int>(ceil_div(buckets, kPrefixThreads / kWarpSize));
    routing_plan_prefix_kernel<<<prefix_blocks, kPrefixThreads, 0, stream>>>(counts, totals, num_experts, chunks.count);
    check_launch("routing_plan_prefix_kernel");

    // One block at least, for the offsets.
    const int tile_blocks = static_cast<int>(num_tiles > 0 ? ceil_div(num_tiles, kThreads) : 1);
    routing_plan_scatter_kernel<<<chunks.count + tile_blocks, kThreads, 2 * buckets * sizeof(int), stream>>>(
        indices, num_slots, num_experts, block_m, chunks.count, chunks.slots, num_tiles, counts, totals, offsets, slots,
        positions, tiles);
    check_launch("routing_plan_scatter_kernel");
}

}  // namespace

int64_t routing_plan_workspace(int64_t num_slots, int num_experts) {
    return (num_experts + 1) * (static_cast<int64_t>(chunks_of(num_slots).count) + 1);
}

void routing_plan(const void* indices, int index_bytes, int64_t num_slots, int num_experts, int block_m,
                  int64_t num_tiles, int* workspace, int* offsets, int* slots, int* positions, int* tiles,
                  cudaStream_t stream) {
    require(num_experts >= 1 && num_experts <= kMaxExperts, "routing_plan: num_experts must be from 1 to ", kMaxExperts,
            ", got ", num_experts);
    require(num_slots >= 0 && num_slots < (int64_t{1} << 31),
            "routing_plan: num_slots must be from 0 to 2**31 - 1, got ", num_slots);
    require(block_m >= 1, "routing_plan: block_m must be positive, got ", block_m);
    require(index_bytes == 4 || index_bytes == 8, "routing_plan: index_bytes must be 4 or 8, got ", index_bytes);
    const Needs needs{"routing_plan"};
    needs.present("workspace", workspace);
    needs.present("offsets", offsets);
    if (num_slots > 0) {
        needs.present("indices", indices);
        needs.present("slots", slots);
        needs.present("positions", positions);
    }
    if (num_tiles > 0) needs.present("tiles", tiles);
    if (index_bytes == 8) {
        launch(static_cast<const int64_t*>(indices), num_slots, num_experts, block_m, num_tiles, workspace, offsets,
               slots, positions, tiles, stream);
    } else {
        launch(static_cast<const int32_t*>(indices), num_slots, num_experts, block_m, num_tiles, workspace, offsets,
               slots, positions, tiles, stream);
    }
}

}  // namespace moe_kernels
