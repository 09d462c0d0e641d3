// routing_plan: expert indices -> a stable counting sort of the slots by expert, and the map of its tiles. One launch.
//
//     bucket[r]    = indices[r] if 0 <= indices[r] < E else E            r in 0..R, the slots; bucket E is "dropped"
//     offsets[e]   = number of slots in buckets below e                  [E+1]
//     row[r]       = offsets[bucket[r]] + |{r' < r : bucket[r'] = bucket[r]}|
//     slots[row[r]] = r                                                  [R]
//     positions[r] = row[r], or -1 in bucket E                           [R]
//     tiles        = per block_m rows of an expert: the expert, its first row; (-1, 0) past the last tile   [2, M]
//
// Kernels take the map's tiles two by two, and share weights where both are one expert's. So an expert's tiles begin at
// an even place; an odd number of them leaves its last one to wait for that of the next expert with an odd number, and
// both come after that one's others. With first[e] the number of tiles of the experts below e, expert e's begin at
// first[e] rounded down to even: it is odd where a tile waits.
//
// R is cut into chunks of whole sub-chunks of kSubChunk slots, one thread block a chunk; a few more blocks write
// offsets and tiles. All are on the GPU together (a cooperative launch), so that they can wait for each other once:
//
//     rank     every slot's rank among the equals of its sub-chunk, and the chunk's histogram   counts[E+1][chunks]
//     (grid-wide barrier)
//     read     every block sums the whole table for itself: totals, and what is in the chunks below its own
//     place    offsets by a scan of the totals; slots and positions, or tiles
//
// A chunk of one sub-chunk, the usual case, keeps its ranks in registers across the barrier; a longer one ranks again.
// Up to kSubChunk slots one block does it all, without a barrier. The table costs every block its size in reads from
// L2: its entries are 16-bit where a chunk's slots allow, and there are fewer chunks for more experts.
//
// The rank must be stable: a warp owns consecutive slots, kRounds times its lanes. In a round, lanes below come first
// (__match_any_sync). Rounds and warps below have left their counts in shared memory, a byte a bucket and warp: the sum
// over the warps below is one 16-byte load and four dot products.
//
// No atomics on data; nothing is read back to the host; the grid depends on shapes and the number of multiprocessors.

#include <cooperative_groups.h>

#include <algorithm>

#include "common.cuh"
#include "routing_plan.h"
#include "scan.cuh"

namespace moe_kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRounds = 4;  // slots of a thread
constexpr int kWarpSlots = kRounds * kWarpSize;
constexpr int kSubChunk = kThreads * kRounds;
static_assert(kWarps == 16 && kWarpSlots < 256, "a bucket has sixteen bytes, a warp's count fits one");

constexpr int kTileBlocks = 8;           // at most, beside the chunks
constexpr int kTableEntries = 1 << 16;   // counts that a block reads at most, which bounds the number of chunks
constexpr int kLeastChunks = 64;         // as many are allowed with any number of experts
constexpr int kSharedOfTwo = 40 * 1024;  // bytes of shared memory with which two blocks fit any multiprocessor

struct Arguments {
    const void* indices_R;
    int64_t num_slots;
    int num_experts;
    int block_m;
    int64_t num_tiles;
    int chunks;
    int64_t slots_per_chunk;
    void* counts;  // [E+1, stride]
    int stride;    // of a bucket's counts: chunks, rounded up to four
    int* offsets_E1;
    int* slots_R;
    int* positions_R;
    int* tiles_2M;
};

// ---------------------------------------------------------------------------------------------------------------------
// rank

template <typename Index>
__device__ __forceinline__ int bucket_of(Index index, int num_experts) {
    return index >= 0 && index < num_experts ? static_cast<int>(index) : num_experts;
}

// A thread's slots of a sub-chunk: bucket << 8 | rank among the equals of the warp's slots; -1 past the end.
struct Ranked {
    int slot[kRounds];
};

// The slot of a thread's first round; the others follow kWarpSize apart.
__device__ __forceinline__ int64_t first_slot(int64_t begin) {
    return begin + threadIdx.x / kWarpSize * kWarpSlots + threadIdx.x % kWarpSize;
}

// On return, by_warp_E1 has the number of slots by bucket and warp. Only thread e % kThreads may have touched bucket e
// since the last barrier.
template <typename Index>
__device__ __forceinline__ void rank_sub_chunk(const Index* __restrict__ indices_R, int64_t begin, int64_t end,
                                               int num_experts, uint4* by_warp_E1, Ranked& ranked) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t first = first_slot(begin);
    Index index[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const int64_t r = first + i * kWarpSize;
        index[i] = r < end ? indices_R[r] : 0;
    }
    for (int e = threadIdx.x; e <= num_experts; e += kThreads) by_warp_E1[e] = make_uint4(0, 0, 0, 0);
    __syncthreads();

    uint8_t* mine = reinterpret_cast<uint8_t*>(by_warp_E1) + threadIdx.x / kWarpSize;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const int bucket = first + i * kWarpSize < end ? bucket_of(index[i], num_experts) : -1;
        const unsigned equals = __match_any_sync(kFullWarp, bucket);
        const int leader = __ffs(equals) - 1;
        int before = 0;
        if (lane == leader && bucket >= 0) {
            before = mine[bucket * kWarps];
            mine[bucket * kWarps] = static_cast<uint8_t>(before + __popc(equals));
        }
        const int rank = __shfl_sync(kFullWarp, before, leader) + __popc(equals & ((1u << lane) - 1));
        ranked.slot[i] = bucket < 0 ? -1 : bucket << 8 | rank;
        __syncwarp();  // another lane may lead the bucket in the next round
    }
    __syncthreads();
}

// ---------------------------------------------------------------------------------------------------------------------
// The table of counts

// Not from L1: other blocks wrote them.
__device__ __forceinline__ void load_four(const uint16_t* counts, int (&values)[4]) {
    const uint2 bits = __ldcg(reinterpret_cast<const uint2*>(counts));
    values[0] = bits.x & 0xffffu;
    values[1] = bits.x >> 16;
    values[2] = bits.y & 0xffffu;
    values[3] = bits.y >> 16;
}

__device__ __forceinline__ void load_four(const int* counts, int (&values)[4]) {
    const int4 loaded = __ldcg(reinterpret_cast<const int4*>(counts));
    values[0] = loaded.x;
    values[1] = loaded.y;
    values[2] = loaded.z;
    values[3] = loaded.w;
}

// The last chunk also writes the zeros that fill its rows up to four.
template <typename Count>
__device__ __forceinline__ void write_counts(const Arguments& a, int chunk, const int* total_E1) {
    Count* counts = static_cast<Count*>(a.counts) + chunk;
    const int fill = chunk == a.chunks - 1 ? a.stride - a.chunks : 0;
    for (int e = threadIdx.x; e <= a.num_experts; e += kThreads) {
        counts[e * a.stride] = static_cast<Count>(total_E1[e]);
        for (int i = 1; i <= fill; ++i) counts[e * a.stride + i] = 0;
    }
}

// Per bucket the slots of all chunks, and of those below this one. Half a warp a bucket, four chunks a lane.
template <typename Count>
__device__ __forceinline__ void read_counts(const Arguments& a, int chunk, int* total_E1, int* before_E1) {
    constexpr int kLanes = 16;
    constexpr int kGroups = kThreads / kLanes;
    constexpr int kBatch = 5;  // buckets of a group whose loads are under way together: all of 128 experts
    const int lane = threadIdx.x % kLanes;
    const unsigned group = 0xffffu << (threadIdx.x % kWarpSize - lane);
    const Count* counts = static_cast<const Count*>(a.counts);

    for (int first = threadIdx.x / kLanes; first <= a.num_experts; first += kBatch * kGroups) {
        int total[kBatch] = {};
        int before[kBatch] = {};
        for (int c = 4 * lane; c < a.chunks; c += 4 * kLanes) {
            int values[kBatch][4] = {};
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int bucket = first + i * kGroups;
                if (bucket <= a.num_experts) load_four(counts + bucket * a.stride + c, values[i]);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    total[i] += values[i][j];
                    before[i] += c + j < chunk ? values[i][j] : 0;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int bucket = first + i * kGroups;
            const int all = __reduce_add_sync(group, total[i]);
            const int below = __reduce_add_sync(group, before[i]);
            if (lane == 0 && bucket <= a.num_experts) {
                total_E1[bucket] = all;
                before_E1[bucket] = below;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// place

// next_E1 holds the row of each bucket's next slot.
__device__ __forceinline__ void place_sub_chunk(const Arguments& a, int64_t begin, const Ranked& ranked,
                                                const uint4* by_warp_E1, const int* next_E1) {
    const int warp = threadIdx.x / kWarpSize;
    const uint4 below = make_uint4(low_bytes(warp), low_bytes(warp - 4), low_bytes(warp - 8), low_bytes(warp - 12));
    const int64_t first = first_slot(begin);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        if (ranked.slot[i] < 0) continue;
        const int bucket = ranked.slot[i] >> 8;
        const int64_t r = first + i * kWarpSize;
        const int row = next_E1[bucket] + sum_bytes(by_warp_E1[bucket], below) + (ranked.slot[i] & 0xff);
        a.slots_R[row] = static_cast<int>(r);
        a.positions_R[r] = bucket < a.num_experts ? row : -1;
    }
}

// One entry of the map of tiles.
__device__ __forceinline__ void write_tile(const Arguments& a, int64_t tile, const int* offsets_E1,
                                           const int* first_tile_E1) {
    auto begin_of = [&](int e) { return first_tile_E1[e] & ~1; };
    auto tiles_of = [&](int e) { return first_tile_E1[e + 1] - first_tile_E1[e]; };
    int expert = -1;
    int row = 0;
    if (tile < first_tile_E1[a.num_experts]) {
        int low = 0;  // the last expert that begins at or before the tile; an empty one begins where the next does
        int high = a.num_experts;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (begin_of(middle) <= tile ? low : high) = middle;
        }
        int within = static_cast<int>(tile) - begin_of(low);
        const int paired = tiles_of(low) & ~1;
        expert = low;
        if (within >= paired) {  // a last tile: the one that waits, if one does, then the expert's own
            if (within == paired && first_tile_E1[low] % 2 != 0) {
                do {
                    --expert;
                } while (tiles_of(expert) % 2 == 0);
            }
            within = tiles_of(expert) - 1;
        }
        row = offsets_E1[expert] + within * a.block_m;
    }
    a.tiles_2M[tile] = expert;
    a.tiles_2M[a.num_tiles + tile] = row;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

template <typename Index, typename Count>
__global__ void __launch_bounds__(kThreads, 2) routing_plan_kernel(const Arguments a) {
    extern __shared__ uint4 shared[];
    const int buckets = a.num_experts + 1;
    uint4* by_warp_E1 = shared;
    int* total_E1 = reinterpret_cast<int*>(shared + buckets);  // then offsets, then each bucket's next row
    int* other_E1 = total_E1 + buckets;                        // slots of the chunks below, or the first tiles

    const Index* indices_R = static_cast<const Index*>(a.indices_R);
    const bool alone = gridDim.x == 1;
    const int chunk = blockIdx.x;
    const bool sorts = chunk < a.chunks;
    const int64_t begin = chunk * a.slots_per_chunk;
    const int64_t end = sorts ? min(begin + a.slots_per_chunk, a.num_slots) : begin;
    const bool one_sub_chunk = end - begin <= kSubChunk;

    Ranked ranked;
    for (int e = threadIdx.x; e < buckets; e += kThreads) total_E1[e] = 0;
    for (int64_t from = begin; from < end; from += kSubChunk) {
        rank_sub_chunk(indices_R, from, end, a.num_experts, by_warp_E1, ranked);
        for (int e = threadIdx.x; e < buckets; e += kThreads) total_E1[e] += sum_bytes(by_warp_E1[e]);
    }
    if (!alone) {
        if (sorts) write_counts<Count>(a, chunk, total_E1);
        cooperative_groups::this_grid().sync();
        read_counts<Count>(a, chunk, total_E1, other_E1);
        __syncthreads();
    }

    const int writer = alone ? 0 : chunk - a.chunks;  // among the blocks that write offsets and tiles
    if (writer >= 0) {
        for (int e = threadIdx.x; e < buckets; e += kThreads) {
            const int rows = e < a.num_experts ? total_E1[e] : 0;
            other_E1[e] = rows / a.block_m + (rows % a.block_m > 0);
        }
        block_exclusive_sum<kThreads>(other_E1, buckets);
    }
    block_exclusive_sum<kThreads>(total_E1, buckets);

    if (writer >= 0) {
        if (writer == 0) {
            for (int e = threadIdx.x; e < buckets; e += kThreads) a.offsets_E1[e] = total_E1[e];
        }
        const int64_t writers = alone ? 1 : gridDim.x - a.chunks;
        const int64_t first = static_cast<int64_t>(writer) * kThreads + threadIdx.x;
        for (int64_t tile = first; tile < a.num_tiles; tile += writers * kThreads) {
            write_tile(a, tile, total_E1, other_E1);
        }
    }
    if (!sorts) return;

    if (!alone) {
        for (int e = threadIdx.x; e < buckets; e += kThreads) total_E1[e] += other_E1[e];
        __syncthreads();
    }
    for (int64_t from = begin; from < end; from += kSubChunk) {
        if (!one_sub_chunk) rank_sub_chunk(indices_R, from, end, a.num_experts, by_warp_E1, ranked);
        place_sub_chunk(a, from, ranked, by_warp_E1, total_E1);
        if (!one_sub_chunk) {
            __syncthreads();
            for (int e = threadIdx.x; e < buckets; e += kThreads) total_E1[e] += sum_bytes(by_warp_E1[e]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

constexpr int shared_bytes(int num_experts) { return (num_experts + 1) * (sizeof(uint4) + 2 * sizeof(int)); }

struct Split {
    int chunks;
    int64_t slots;    // per chunk
    int tile_blocks;  // at most; 0 where one block does it all
    int stride;
    bool narrow;  // counts of 16 bits
};

// No more blocks than are on the GPU together, which __launch_bounds__ and kSharedOfTwo make certain.
Split split_of(int64_t num_slots, int num_experts, int num_sms) {
    const int resident = num_sms * (shared_bytes(num_experts) <= kSharedOfTwo ? 2 : 1);
    const int tile_blocks = std::min(kTileBlocks, resident / 2);
    const int64_t most = std::min(resident - tile_blocks, std::max(kLeastChunks, kTableEntries / (num_experts + 1)));
    const int64_t sub_chunks = std::max<int64_t>(1, ceil_div(num_slots, kSubChunk));
    const int64_t slots = ceil_div(sub_chunks, most) * kSubChunk;
    const int chunks = static_cast<int>(std::max<int64_t>(1, ceil_div(num_slots, slots)));
    return {chunks, slots, chunks > 1 ? tile_blocks : 0, static_cast<int>(ceil_div(chunks, 4) * 4), slots < 1 << 16};
}

template <typename Index, typename Count>
void launch(const Arguments& a, int blocks, cudaStream_t stream) {
    const int bytes = shared_bytes(a.num_experts);
    const auto kernel = routing_plan_kernel<Index, Count>;
    if (bytes > kSharedOfTwo) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "routing_plan_kernel");
    }
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = blocks > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, a), "routing_plan_kernel");
}

}  // namespace

int64_t routing_plan_workspace(int64_t num_slots, int num_experts, int num_sms) {
    const Split split = split_of(num_slots, num_experts, num_sms);
    if (split.chunks == 1) return 0;
    const int64_t entries = (num_experts + int64_t{1}) * split.stride;
    return split.narrow ? entries / 2 : entries;
}

void routing_plan(const void* indices, int index_bytes, int64_t num_slots, int num_experts, int block_m,
                  int64_t num_tiles, int num_sms, int* workspace, int* offsets, int* slots, int* positions, int* tiles,
                  cudaStream_t stream) {
    require(num_experts >= 1 && num_experts <= kMaxExperts, "routing_plan: num_experts must be from 1 to ", kMaxExperts,
            ", got ", num_experts);
    require(num_slots >= 0 && num_slots < (int64_t{1} << 31),
            "routing_plan: num_slots must be from 0 to 2**31 - 1, got ", num_slots);
    require(block_m >= 1, "routing_plan: block_m must be positive, got ", block_m);
    require(index_bytes == 4 || index_bytes == 8, "routing_plan: index_bytes must be 4 or 8, got ", index_bytes);
    require(num_sms >= 1, "routing_plan: num_sms must be positive, got ", num_sms);
    const Split split = split_of(num_slots, num_experts, num_sms);
    const Needs needs{"routing_plan"};
    if (split.chunks > 1) needs.aligned("workspace", workspace);
    needs.present("offsets", offsets);
    if (num_slots > 0) {
        needs.present("indices", indices);
        needs.present("slots", slots);
        needs.present("positions", positions);
    }
    const int64_t most_tiles = num_slots / block_m + std::min<int64_t>(num_slots, num_experts);
    require(num_tiles >= most_tiles, "routing_plan: num_tiles must be at least ", most_tiles, ", got ", num_tiles);
    if (num_tiles > 0) needs.present("tiles", tiles);

    const Arguments a{indices,   num_slots,    num_experts, block_m, num_tiles, split.chunks, split.slots,
                      workspace, split.stride, offsets,     slots,   positions, tiles};
    const int64_t tile_blocks =
        std::min<int64_t>(split.tile_blocks, std::max<int64_t>(1, ceil_div(num_tiles, kThreads)));
    const int blocks = split.chunks + static_cast<int>(tile_blocks);
    if (index_bytes == 8) {
        return split.narrow ? launch<int64_t, uint16_t>(a, blocks, stream) : launch<int64_t, int>(a, blocks, stream);
    }
    return split.narrow ? launch<int32_t, uint16_t>(a, blocks, stream) : launch<int32_t, int>(a, blocks, stream);
}

}  // namespace moe_kernels
