// The kernel of grouped_wgrad; its equation and shapes: grouped_wgrad.cu.
//
// Tiling as in sm90/varlen_m.cuh, but the reduction runs over an expert's rows, 64 at a time, so both operands lie
// across it. A block makes 256 columns of the gathered side times 192 of the contiguous side, a consumer half of the
// former, in two products. 22 % fewer bytes go into shared memory than with 128 times 256 columns, which remain for
// widths that they fit better. A cluster's two blocks make neighbouring tiles of the gathered side and share the
// contiguous tile, each fetching half of it for both. The contiguous side comes by the copy engine, the gathered side
// by cp.async of three of the producer's warps. Where the gathered side is rhs the accumulator is dW transposed, and is
// turned on its way to shared memory. In an expert's last, ragged step both sides come by cp.async, which puts zeros in
// place of rows past the end: those belong to the next expert, or to nobody and may hold anything. An expert without
// rows takes one step of zeros. One block adds up a tile from first row to last, so the sum has one order. Where
// nothing is gathered, one side comes as a gathered one would, row r for row r.
//
// Tiles of long experts come first: a tile has all rows of its expert as steps, however many, so a long one drawn last
// would leave the other multiprocessors idle. A drawing block counts at its start how many experts are longer than
// each, about 0.3 µs for 128 of them, 3 for 512. More than that come as they are. The order of tiles changes no sum.
//
// Accumulating, the copy engine adds a chunk to memory instead of storing it: the sum, rounded to dW's type, and one
// more rounding. Every element is added to once, so the result does not depend on the order of the tiles.
#pragma once

#include <type_traits>

#include "sm90/chunk.cuh"
#include "sm90/longest_first.cuh"
#include "sm90/multiply.cuh"
#include "sm90/pipeline.cuh"
#include "tensor_map.h"

namespace moe_kernels {

// A block's tile: kM columns of the gathered side (A), kBlocks times 64 of them a consumer's, times kN of the
// contiguous side (B). A stage holds chunks [64 rows, 64 columns] of A, then of B. Registers: of a thread.
template <int kBlocksOf, int kNOf, int kStagesOf, int kBuffersOf, int kConsumerRegistersOf, int kProducerRegistersOf>
struct Tiling {
    static constexpr int kBlocks = kBlocksOf, kM = kConsumers * kBlocks * 64, kN = kNOf, kStages = kStagesOf;
    static constexpr int kBytesOfA = kM * kRowBytes, kBytesOfB = kN * kRowBytes, kBytesOfStage = kBytesOfA + kBytesOfB;
    // Chunks that a consumer has for results on their way out, and behind them all the order of the experts.
    static constexpr int kBuffers = kBuffersOf, kResultBytes = kConsumers * kBuffers * kChunkBytes;
    static constexpr int kStagingBytes = kResultBytes + kMostSorted * static_cast<int>(sizeof(short));
    static_assert(kBlocks * kN / 64 % kBuffers == 0, "every tile begins with the first of them");
    // B comes in boxes of 64 columns and as many rows as let the blocks of a cluster fetch equally many.
    static constexpr int kBoxRows = kN / 64 % kCluster == 0 ? kTileK : kTileK / kCluster;
    static constexpr int kBoxBytes = kBoxRows * kRowBytes, kBoxes = kBytesOfB / kBoxBytes / kCluster;  // of a block
    static_assert(kBoxBytes % kAlignment == 0 && kBoxes * kCluster * kBoxBytes == kBytesOfB);

    // What the consumers take must have been given, or they wait for ever.
    static constexpr int kConsumerRegisters = kConsumerRegistersOf, kProducerRegisters = kProducerRegistersOf;
    static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (1 + kConsumers) * kLaunchRegisters);
    static_assert(kConsumerRegisters % 8 == 0 && kProducerRegisters % 8 == 0);
};

using Tall = Tiling<2, 192, 3, 3, 224, 56>;  // 256 x 192
using Wide = Tiling<1, 256, 4, 2, 208, 88>;  // 128 x 256

struct Wgrad {
    CUtensorMap contiguous_map;  // [1, R, contiguous_width], box [1, kBoxRows, 64]
    CUtensorMap dw;              // [E, M, N], box [1, kRows or, lhs gathered, kWarpRows, 128 bytes]
    const void *gathered, *contiguous;
    uint32_t gathered_row_bytes, contiguous_stride;  // the stride in bytes, and in elements
    int gathered_width, contiguous_width, m, n;
    const int* offsets;
    const int* slots;  // null: the gathered side's row is the row itself
    Divisor top_k;     // then 1
    bool accumulate;
    int num_experts, num_pairs, num_columns;  // pairs of gathered tiles, contiguous tiles
    int* counter;                             // of tiles drawn, zero before the launch
};

// The rows of an expert, a pair of tiles of the gathered side, a tile of the contiguous side; the expert is kStop after
// the last.
struct alignas(16) WgradTile {
    int expert, begin, end;
    short pair, column;

    __device__ __forceinline__ int steps() const { return max((end - begin + kTileK - 1) / kTileK, 1); }
};

// The drawing thread's side of the ring of tiles; see sm90/varlen_m.cuh. All tiles of an expert before the next
// expert's.
struct WgradDraw {
    int number;
    WgradTile tile;

    __device__ __forceinline__ void draw(const Wgrad& p) { number = draw_number(p.counter); }

    __device__ __forceinline__ void look_up(const Wgrad& p, const short* order) {
        const int per_expert = p.num_pairs * p.num_columns;
        const int place = number / per_expert, within = number % per_expert;
        tile = {kStop, 0, 0, 0, 0};
        if (place < p.num_experts) {
            const int expert = p.num_experts <= kMostSorted ? order[place] : place;
            tile = {expert, __ldg(p.offsets + expert), __ldg(p.offsets + expert + 1),
                    static_cast<short>(within % p.num_pairs), static_cast<short>(within / p.num_pairs)};
        }
    }
};

// A gathering thread's share of the gathered side of a step, [64 rows, kM columns]: a 16-byte piece of each of its
// chunks of 64 columns, of every twelfth row. So one address serves kM / 64 copies. Lane i < 24 keeps the number (token
// or row) of the warp's i-th row.
template <int kM>
struct Gather {
    static constexpr int kTurns = (kTileK + kGatherRows - 1) / kGatherRows, kRowsOfWarp = kGatherRows / kGatherWarps;
    static_assert(kRowsOfWarp * kTurns <= kWarpSize);
    static_assert(kGatherRows % 8 == 4);  // from turn to turn the swizzle changes its bit of four pieces

    int lane, first_row;
    uint32_t at;  // where its piece of that row goes

    __device__ __forceinline__ explicit Gather(int thread)
        : lane(thread % kWarpSize), first_row(thread / 8), at(swizzled(first_row, lane % 8)) {}

    // The row of the step that this lane keeps the number of; past the last for some.
    __device__ __forceinline__ int kept_row() const {
        return first_row - lane / 8 + lane % kRowsOfWarp + lane / kRowsOfWarp * kGatherRows;
    }

    __device__ __forceinline__ int column() const { return lane % 8 * 8; }

    // `data`: this thread's column of the tensor's row 0. kWhole: every row and column exists; else zeros take the
    // place of all but the first `rows` rows and `columns` columns from the thread's on. The number is that of some row
    // in any case.
    template <bool kWhole>
    __device__ __forceinline__ void copy(uint32_t to, const unsigned char* data, uint32_t row_bytes, int number,
                                         int rows, int columns) const {
        const uint32_t even = to + at;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            // The last turn has rows for the first warp only.
            if (turn == kTurns - 1 && all_lanes(first_row >= kTileK - turn * kGatherRows)) break;
            const uint32_t row = __shfl_sync(kFullWarp, number, kRowsOfWarp * turn + lane / 8);
            const unsigned char* from = data + static_cast<uint64_t>(row) * row_bytes;
            const uint32_t address = (turn % 2 == 0 ? even : even ^ 64) + turn * kGatherRows * kRowBytes;
#pragma unroll
            for (int i = 0; i < kM / 64; ++i) {
                if (kWhole) {
                    ptx::cp_async_16(address + i * kChunkBytes, from + i * kRowBytes);
                } else {
                    const bool exists = first_row + turn * kGatherRows < rows && 64 * i < columns;
                    ptx::cp_async_16_or_zero(address + i * kChunkBytes, exists ? from + i * kRowBytes : data, exists);
                }
            }
        }
    }
};

// A gathering thread's share of the contiguous side of a ragged step, [64 rows, kN columns], of which `rows` by
// `columns` exist. `data`: any element that may be read; the step begins at `row` and `column`.
template <int kN, typename T>
__device__ __forceinline__ void copy_ragged(uint32_t to, int thread, const T* data, uint32_t stride, int row, int rows,
                                            int column, int columns) {
    const int piece = thread % 8;
#pragma unroll 1
    for (int r = thread / 8; r < kTileK; r += kGatherRows) {
        const T* source = data + static_cast<uint64_t>(row + r) * stride + column + piece * 8;
#pragma unroll
        for (int i = 0; i < kN / 64; ++i) {
            const bool exists = r < rows && 64 * i + piece * 8 < columns;
            ptx::cp_async_16_or_zero(to + i * kChunkBytes + swizzled(r, piece), exists ? source + 64 * i : data,
                                     exists);
        }
    }
}

// Sixteen by 64 results of a warp into a chunk [64 contiguous columns, 64 gathered columns]: dW transposed, turned.
template <typename T>
__device__ __forceinline__ void write_chunk_transposed(uint32_t chunk, int warp, int lane, const float* values) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = 4 * j + 2 * i;
            words[i] = from_floats(values[at], values[at + 1], static_cast<const T*>(nullptr));
        }
        const int row = 8 * (j + (lane >> 4)) + (lane & 7);
        ptx::stmatrix_x4_transposed(chunk + swizzled(row, 2 * warp + (lane >> 3 & 1)), words);
    }
}

// A block of 64 contiguous columns in float: two chunks [64 rows, 32 columns]. Upright, they are left and right of each
// other in dW; transposed, its gathered columns are 32 of warps 0 and 1, and 32 of warps 2 and 3.
template <bool kTransposed>
__device__ __forceinline__ void write_float_chunks(uint32_t chunks, int warp, int lane, const float* values) {
    if constexpr (kTransposed) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 2 * (lane % 4) + i % 2, column = 16 * warp + lane / 4 + 8 * (i / 2);
            const uint32_t at =
                chunks + column / 32 * kChunkBytes + swizzled(row, column % 32 / 4) + column % 4 * sizeof(float);
#pragma unroll
            for (int j = 0; j < 8; ++j) {  // eight rows further on the swizzle is the same
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + j * 8 * kRowBytes), "f"(values[4 * j + i])
                             : "memory");
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int row = 16 * warp + lane / 4, piece = j % 4 * 2 + lane % 4 / 2;
            const uint32_t at = chunks + j / 4 * kChunkBytes + swizzled(row, piece) + lane % 2 * 2 * sizeof(float);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + i / 2 * 8 * kRowBytes),
                             "f"(values[4 * j + i]), "f"(values[4 * j + i + 1])
                             : "memory");
            }
        }
    }
}

// One thread: draws tiles, and the copy engine's work.
template <typename Tiling, typename T>
__device__ __forceinline__ void load(const Wgrad& p, const Shared<Tiling::kStages, WgradTile>& shared,
                                     const short* order) {
    constexpr int kN = Tiling::kN;
    const int rank = ptx::cluster_rank();
    const bool draws = rank == 0;
    auto& tiles = shared.tiles;
    Ring<Tiling::kStages> ring;
    WgradDraw next;
    tiles.expect(0);
    if (draws) {
        next.number = first_number();
        next.look_up(p, order);
        tiles.publish(0, next.tile, next.tile);
    }
    WgradTile tile = tiles.wait(0);
    for (int j = 0; tile.expert != kStop; ++j) {
        const int steps = tile.steps();
        tiles.expect(j + 1);
        for (int k = 0; k < steps; ++k, ring.advance()) {
            const int row = tile.begin + k * kTileK;
            if (draws) {
                if (k == 0) next.draw(p);
                if (k == steps / 3) next.look_up(p, order);
                if (k == steps * 2 / 3) tiles.publish(j + 1, next.tile, next.tile);
            }
            const bool whole = row + kTileK <= tile.end;
            unsigned char* b = shared.stages + ring.stage * Tiling::kBytesOfStage + Tiling::kBytesOfA;
            uint64_t* barrier = shared.full + ring.stage;
            ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
            ptx::mbarrier_arrive_expect(barrier, whole ? Tiling::kBytesOfB : 0);
            if (whole) {
#pragma unroll
                for (int i = 0; i < Tiling::kBoxes; ++i) {
                    const int box = rank * Tiling::kBoxes + i, box_row = box * Tiling::kBoxRows;
                    ptx::tma_load_3d_multicast(b + box * Tiling::kBoxBytes, &p.contiguous_map, barrier,
                                               tile.column * kN + box_row / kTileK * 64, row + box_row % kTileK, 0,
                                               kBothBlocks);
                }
            }
        }
        tile = tiles.wait(j + 1);
    }
}

// The gathering warps.
template <typename Tiling, typename T>
__device__ __forceinline__ void gather(const Wgrad& p, const Shared<Tiling::kStages, WgradTile>& shared, int thread) {
    constexpr int kM = Tiling::kM, kN = Tiling::kN;
    const int rank = ptx::cluster_rank();
    auto& tiles = shared.tiles;
    Ring<Tiling::kStages> ring;
    const Gather<kM> share(thread);
    const int kept = share.kept_row();
    // The slot of this lane's row of the step that begins at `row`; a row past the end repeats the last one.
    auto slot_of = [&](const WgradTile& of, int row) {
        if (of.begin >= of.end) return 0;
        const int mine = min(row + kept, of.end - 1);
        return p.slots == nullptr ? mine : __ldg(p.slots + mine);
    };
    WgradTile tile = tiles.wait(0);
    int slot = slot_of(tile, tile.begin);
    for (int j = 0; all_lanes(tile.expert != kStop); ++j) {
        const int g = (kCluster * tile.pair + rank) * kM;
        const bool all_columns = all_lanes(g + kM <= p.gathered_width);
        const bool inside = g + share.column() < p.gathered_width;
        const unsigned char* gathered =
            static_cast<const unsigned char*>(p.gathered) + (inside ? (g + share.column()) * sizeof(T) : 0);
        asm("" : "+l"(gathered));  // one register pair: keeps the compiler from adding its parts again for every row
        const int steps = uniform(tile.steps());
        for (int k = 0; k < steps; ++k, ring.advance()) {
            const int row = tile.begin + k * kTileK;
            const int token = p.top_k.divide(slot);
            if (k < steps - 1) {
                slot = slot_of(tile, row + kTileK);
            } else {
                const WgradTile coming = tiles.wait(j + 1);
                slot = slot_of(coming, coming.begin);
            }
            const bool whole = all_lanes(row + kTileK <= tile.end);
            unsigned char* a = shared.stages + ring.stage * Tiling::kBytesOfStage;
            unsigned char* b = a + Tiling::kBytesOfA;
            ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
            if (whole && all_columns) {
                share.template copy<true>(ptx::shared_address(a), gathered, p.gathered_row_bytes, token, kTileK, kM);
            } else {
                int t = thread;
                asm volatile("" : "+r"(t));  // or else what follows from it here is kept all through the loop
                const Gather<kM> again(t);
                const int rows = tile.end - row;  // of this step; 64 or more is all
                again.template copy<false>(ptx::shared_address(a), gathered, p.gathered_row_bytes, token, rows,
                                           p.gathered_width - g - again.column());
                if (!whole) {
                    copy_ragged<kN>(ptx::shared_address(b), t, static_cast<const T*>(p.contiguous), p.contiguous_stride,
                                    row, rows, tile.column * kN, p.contiguous_width - tile.column * kN);
                }
            }
            ptx::mbarrier_arrive_after_copies(shared.full + ring.stage);
        }
        tile = tiles.wait(j + 1);
    }
}

template <typename Tiling, typename T, typename Out, bool kGatherLhs>
__device__ __forceinline__ void consume(const Wgrad& p, const Shared<Tiling::kStages, WgradTile>& shared, int consumer,
                                        int thread) {
    constexpr int kBuffers = Tiling::kBuffers, kChunks = Tiling::kN / 64;
    const int warp = uniform(thread / kWarpSize), lane = thread % kWarpSize;
    const int rank = ptx::cluster_rank();
    // Upright, a warp has made whole rows of a chunk, and sends those. Transposed, the chunk is of all four.
    const int own_row = kGatherLhs ? warp * kWarpRows : 0;
    const bool leads = kGatherLhs || warp == 0;  // this warp
    auto meet = [&] { kGatherLhs ? __syncwarp() : warpgroup_sync(consumer); };
    Ring<Tiling::kStages> ring;
    unsigned char* chunks = shared.staging + consumer * kBuffers * kChunkBytes;
    for (int j = 0;; ++j) {
        const WgradTile tile = shared.tiles.wait(j);
        if (all_lanes(tile.expert == kStop)) break;
        float acc[Tiling::kBlocks][Tiling::kN / 2];
        multiply<T, true, true, true>(acc, shared, ring, tile.steps(), consumer, lane == 0, [](int) {});
        constexpr bool kFloat = std::is_same_v<Out, float>;
        constexpr int kAtOnce = kFloat ? 2 : 1;  // chunks that a block of 64 columns takes
#pragma unroll
        for (int i = 0; i < Tiling::kBlocks * kChunks; ++i) {
            unsigned char* chunk = chunks + (kFloat ? 0 : i % kBuffers * kChunkBytes);
            const uint32_t to = ptx::shared_address(chunk);
            auto write = [&] {
                const float* values = acc[i / kChunks] + 32 * (i % kChunks);
                if constexpr (kFloat) {
                    write_float_chunks<!kGatherLhs>(to, warp, lane, values);
                } else if constexpr (kGatherLhs) {
                    write_chunk<T>(to, warp * 16, lane, values);
                } else {
                    write_chunk_transposed<T>(to, warp, lane, values);
                }
            };
            auto send = [&] {
                if (!leads || (p.accumulate && tile.begin >= tile.end)) return;
                if (!ptx::elect()) return;
                const int g =
                    (kCluster * tile.pair + rank) * Tiling::kM + (consumer * Tiling::kBlocks + i / kChunks) * kRows;
                const int c = tile.column * Tiling::kN + 64 * (i % kChunks);
                const int row = (kGatherLhs ? g : c) + own_row, column = kGatherLhs ? c : g;
#pragma unroll
                for (int part = 0; part < kAtOnce; ++part) {
                    if (row < p.m && column + 32 * part < p.n) {
                        const unsigned char* from = chunk + part * kChunkBytes + own_row * kRowBytes;
                        if (p.accumulate) {
                            ptx::tma_add_3d(&p.dw, from, column + 32 * part, row, tile.expert);
                        } else {
                            ptx::tma_store_3d(&p.dw, from, column + 32 * part, row, tile.expert);
                        }
                    }
                }
            };
            through_staging<kBuffers / kAtOnce - 1>(leads && ptx::elect(), meet, write, send);
        }
    }
    if (leads && ptx::elect()) ptx::bulk_wait<0>();  // shared memory must outlive the copies that read it
}

template <typename Tiling, typename T, typename Out, bool kGatherLhs>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    grouped_wgrad_kernel(const __grid_constant__ Wgrad p) {
    extern __shared__ unsigned char memory[];
    const auto shared = init_shared<Tiling::kStages, Tiling::kStagingBytes, WgradTile, Tiling::kBytesOfStage>(
        memory, kGatherThreads + 1);
    const int warpgroup = uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
    if (warpgroup == 0) {
        ptx::give_registers<Tiling::kProducerRegisters>();
        short* order = reinterpret_cast<short*>(shared.staging + Tiling::kResultBytes);
        if (ptx::cluster_rank() == 0 && p.num_experts <= kMostSorted) {  // results' memory is free until a tile is made
            sort_experts(p.offsets, p.num_experts, reinterpret_cast<uint32_t*>(shared.staging), order, thread);
        }
        if (uniform(thread / kWarpSize) > 0) {
            gather<Tiling, T>(p, shared, thread - kWarpSize);
        } else if (ptx::elect()) {
            load<Tiling, T>(p, shared, order);
        }
    } else {
        ptx::take_registers<Tiling::kConsumerRegisters>();
        consume<Tiling, T, Out, kGatherLhs>(p, shared, warpgroup - 1, thread);
    }
    ptx::cluster_sync();  // a block's shared memory must outlive what the other one sends there
}

}  // namespace moe_kernels
