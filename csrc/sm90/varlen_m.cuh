// The products over an expert's rows on Hopper: gate_up and d_activation are this one kernel, and grouped_gemm (down,
// dX) where the reduction is long; pingpong.cuh has the others.
//
//     C[r, n] = sum_k A[row(r), k] * W[e, n, k]        for the rows r of expert e; what becomes of C is the epilogue's
//
// Tiling: C in tiles of 128 rows x 256 columns, 64 of the reduction at a time. A block is one producer warpgroup and
// two consumer warpgroups, which own 64 rows each (256 columns, 128 accumulators a thread). The producer keeps kStages
// tiles of A and W in flight and runs ahead into the next tile while the consumers are in their epilogue. Contiguous
// operands come by the copy engine, gathered rows of A by cp.async of three of its warps, both counted on the same
// mbarrier. A cluster is two blocks with neighbouring row tiles and the same columns. Where both belong to one expert,
// each fetches half of the weights for both: a third less from L2, which is what limits the kernel next to power. The
// last tiles of two experts that have an odd number each make a pair all the same, without sharing (routing_plan.cu).
// Grid: a block a multiprocessor; clusters draw their tiles one by one. A tile that ends an expert covers the next
// expert's rows too; they are computed (or, a whole half, skipped) and not stored. Who makes a tile depends on timing,
// what becomes of it does not: reruns are bitwise equal.
//
// Ideas: warp-specialised gather by cp.async beside the copy engine, QuACK and SonicMoE (arXiv 2512.14080); 128x256
// tiles with two consumers, CUTLASS and fast.cu.
#pragma once

#include "plan.h"
#include "sm90/chunk.cuh"
#include "sm90/multiply.cuh"
#include "sm90/pipeline.cuh"
#include "tensor_map.h"
#include "weights.h"

namespace moe_kernels {

struct VarlenM {
    CUtensorMap a;       // contiguous A: [1, R, C], box [1, 128, 64]
    const void* rows;    // gathered A: [T, C]
    int64_t row_stride;  // elements
    const int* slots;    // [R]; the token of row r is slots[r] / top_k
    Divisor top_k;
    CUtensorMap w;       // stored along the reduction: [E, N, C]; across it: [E, C, N]
    const int* offsets;  // [E + 1]
    const int* tiles;    // [2, num_m_tiles]: expert or -1, first row
    int num_m_tiles;
    int num_n_tiles;
    int steps;        // of kTileK
    int group_pairs;  // of row tiles that share weights in L2 before the next column tile
    int num_rows;     // R
    int* counter;     // of tiles drawn, zero before the launch
};

// Rows first..end (the expert's end may lie beyond the tile's) and a column tile. The expert is kUnused in a block
// whose sibling has a tile and it has none, kStop after the last.
constexpr int kUnused = -1;
constexpr int kShared = 1 << 30;  // in column: both blocks of the cluster have this expert, and share its weights

struct alignas(16) Tile {
    int expert, first, end, column;

    __device__ __forceinline__ int i_n() const { return column & ~kShared; }
    __device__ __forceinline__ bool shared() const { return column & kShared; }
};

// The drawing thread's side.
struct Draw {
    int number;
    Tile tiles[kCluster];

    __device__ __forceinline__ void draw(const VarlenM& p) { number = draw_number(p.counter); }

    __device__ __forceinline__ void look_up(const VarlenM& p) {
        static_assert(kCluster == 2);  // num_pairs, and the two tiles below
        const int num_pairs = (p.num_m_tiles + 1) / kCluster;
        const int per_group = p.group_pairs * p.num_n_tiles;
        const int group = number / per_group, within = number % per_group;
        const int first = group * p.group_pairs;
        const int height = min(num_pairs - first, p.group_pairs);
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) {
            tiles[rank] = {kStop, 0, 0, 0};
            if (number < num_pairs * p.num_n_tiles) {
                const int i_m = kCluster * (first + within % height) + rank;
                tiles[rank] = {kUnused, 0, 0, within / height};
                if (i_m < p.num_m_tiles) {
                    tiles[rank].expert = __ldg(p.tiles + i_m);
                    tiles[rank].first = __ldg(p.tiles + p.num_m_tiles + i_m);
                }
            }
        }
    }

    __device__ __forceinline__ void find_ends(const VarlenM& p) {
        // No block is told of a pair without a tile: where the first is unused so is the second, as the map's unused
        // entries come last. Other pairs of the same group may still follow, with the next column tile.
        while (tiles[0].expert == kUnused) {
            draw(p);
            look_up(p);
        }
        const bool shared = tiles[0].expert == tiles[1].expert;
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) {
            tiles[rank].end = tiles[rank].expert < 0 ? 0 : __ldg(p.offsets + tiles[rank].expert + 1);
            tiles[rank].column |= shared ? kShared : 0;
        }
    }
};

// Half of the weights of a step, to this block or to `blocks`; a box is 128 rows (along) or 64 columns (across).
__device__ __forceinline__ void load_weight_box(const CUtensorMap& w, unsigned char* to, uint64_t* barrier, int c0,
                                                int c1, int expert, uint16_t blocks) {
    if (blocks == 0) {
        ptx::tma_load_3d(to, &w, barrier, c0, c1, expert);
    } else {
        ptx::tma_load_3d_multicast(to, &w, barrier, c0, c1, expert, blocks);
    }
}

constexpr int kHalfN = kTileN / 2;

template <bool kAcross>
__device__ __forceinline__ void load_weight_half(const CUtensorMap& w, unsigned char* to, uint64_t* barrier,
                                                 const Tile& tile, int k, int half, uint16_t blocks) {
    const int n = tile.i_n() * kTileN + half * kHalfN;
    to += half * kHalfN * kRowBytes;
    if constexpr (kAcross) {
#pragma unroll
        for (int i = 0; i < kHalfN / 64; ++i) {
            load_weight_box(w, to + i * kChunkBytes, barrier, n + 64 * i, k, tile.expert, blocks);
        }
    } else {
        load_weight_box(w, to, barrier, k, n, tile.expert, blocks);
    }
}

// What becomes of the accumulators. An op's epilogue derives from this and adds
//
//     kName, kStagingBytes
//     struct Arguments                                     its own part of the kernel's arguments
//     Epilogue(args, p, staging, consumer, thread)         one for each thread of a consumer, for all its tiles
//     finish(tile, first, rows, acc, stages, take, give_back)
//                                                          a tile's `rows` > 0 rows of this consumer, from row `first`
//
// take() waits for the next of the tile's kSteps own stages and returns its number n: it lies at stages + n *
// kStageBytes. Once all of a warp are done with it, one of its lanes calls give_back(n). Where a consumer has no rows,
// begin, look_ahead and finish are not called. What stands here may be replaced.
struct EpilogueDefaults {
    static constexpr int kSteps = 0;      // stages that a tile takes after the reduction's
    static constexpr int kStepBytes = 0;  // that load_step copies

    // One thread of the producer: own stage c of a tile, kStepBytes to `to`, counted on the barrier.
    template <typename Arguments>
    static __device__ __forceinline__ void load_step(const Arguments&, unsigned char*, uint64_t*, const Tile&, int) {}

    // One thread of the producer: half of the weights of the step at k.
    template <bool kAcross, typename Arguments>
    static __device__ __forceinline__ void load_weights(const Arguments&, const CUtensorMap& w, unsigned char* to,
                                                        uint64_t* barrier, const Tile& tile, int k, int half,
                                                        uint16_t blocks) {
        load_weight_half<kAcross>(w, to, barrier, tile, k, half, blocks);
    }

    // The consumer before the reduction (first, rows), and kLookAheadStep steps into it: what finish needs may be
    // loaded here, the second time by what the first has brought.
    __device__ __forceinline__ void begin(int, int) {}
    __device__ __forceinline__ void look_ahead() {}
};

constexpr int kLookAheadStep = 2;  // or the last one of a short reduction

// One thread: draws tiles, and the copy engine's work.
template <typename T, bool kGather, bool kAcross, int kStages, typename Epilogue>
__device__ __forceinline__ void load(const VarlenM& p, const typename Epilogue::Arguments& args,
                                     const Shared<kStages, Tile>& shared) {
    const int rank = ptx::cluster_rank(), steps = p.steps;
    const bool draws = rank == 0;
    auto& tiles = shared.tiles;
    Ring<kStages> ring;
    Draw next;
    tiles.expect(0);
    if (draws) {
        next.number = first_number();
        next.look_up(p);
        next.find_ends(p);
        tiles.publish(0, next.tiles[0], next.tiles[1]);
    }
    Tile tile = tiles.wait(0);
    for (int j = 0; tile.expert != kStop; ++j) {
        const bool used = tile.expert != kUnused;
        tiles.expect(j + 1);
        for (int k = 0; k < steps; ++k, ring.advance()) {
            if (draws) {
                if (k == 0) next.draw(p);
                if (k == steps / 4) next.look_up(p);
                if (k == steps / 2) next.find_ends(p);
                if (k == steps * 3 / 4) tiles.publish(j + 1, next.tiles[0], next.tiles[1]);
            }
            unsigned char* a = shared.stages + ring.stage * kStageBytes;
            unsigned char* b = a + kABytes;
            uint64_t* barrier = shared.full + ring.stage;
            ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
            ptx::mbarrier_arrive_expect(barrier, !used ? 0 : kGather ? kBBytes : kStageBytes);
            if (used) {
                if (!kGather) ptx::tma_load_3d(a, &p.a, barrier, k * kTileK, tile.first, 0);
                // Sharing, each block fetches half of the weights for both.
                static_assert(kCluster == 2);
                const uint16_t blocks = tile.shared() ? kBothBlocks : 0;
#pragma unroll
                for (int half = 0; half < kCluster; ++half) {
                    if (half != rank && tile.shared()) continue;
                    Epilogue::template load_weights<kAcross>(args, p.w, b, barrier, tile, k * kTileK, half, blocks);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < Epilogue::kSteps; ++c, ring.advance()) {
            uint64_t* barrier = shared.full + ring.stage;
            ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
            ptx::mbarrier_arrive_expect(barrier, used ? Epilogue::kStepBytes : 0);
            if (used) Epilogue::load_step(args, shared.stages + ring.stage * kStageBytes, barrier, tile, c);
        }
        tile = tiles.wait(j + 1);
    }
}

// The gathering warps: a thread copies one 16-byte piece of every twelfth row.
template <typename T, int kStages, typename Epilogue>
__device__ __forceinline__ void gather(const VarlenM& p, const Shared<kStages, Tile>& shared, int thread) {
    constexpr int kTurns = (kTileM + kGatherRows - 1) / kGatherRows;
    static_assert(kGatherRows % 8 == 4);  // from turn to turn the swizzle changes its bit of four pieces

    constexpr int kTogether = 2;  // steps, for whose addresses one sum will do
    const int steps = p.steps, piece = thread % 8, first_row = thread / 8;
    const uint32_t at = swizzled(first_row, piece);
    const bool last = all_lanes(first_row + (kTurns - 1) * kGatherRows < kTileM);
    auto& tiles = shared.tiles;
    Ring<kStages> ring;
    int slots[kTurns];
    auto load_slots = [&](const Tile& of) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
            // A row past the expert's end repeats its last one.
            slots[i] = of.expert < 0 ? 0 : __ldg(p.slots + min(of.first + first_row + kGatherRows * i, of.end - 1));
        }
    };
    Tile tile = tiles.wait(0);
    load_slots(tile);
    for (int j = 0; all_lanes(tile.expert != kStop); ++j) {
        const bool used = all_lanes(tile.expert != kUnused);
        const unsigned char* source[kTurns];
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
            const T* row = static_cast<const T*>(p.rows) + p.top_k.divide(slots[i]) * p.row_stride;
            source[i] = reinterpret_cast<const unsigned char*>(row + piece * 8);
        }
        for (int k = 0; k < steps; k += kTogether) {
#pragma unroll
            for (int step = 0; step < kTogether; ++step) {
                if (k + step == steps) break;
                if (k + step == steps - 1) {
                    tile = tiles.wait(j + 1);
                    load_slots(tile);
                }
                ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
                if (used) {
                    const uint32_t even = ptx::shared_address(shared.stages + ring.stage * kStageBytes) + at;
#pragma unroll
                    for (int i = 0; i < kTurns; ++i) {
                        if (i < kTurns - 1 || last) {
                            const uint32_t to = (i % 2 == 0 ? even : even ^ 64) + i * kGatherRows * kRowBytes;
                            ptx::cp_async_16(to, source[i] + step * kRowBytes);
                        }
                    }
                }
                ptx::mbarrier_arrive_after_copies(shared.full + ring.stage);
                ring.advance();
            }
#pragma unroll
            for (int i = 0; i < kTurns; ++i) source[i] += kTogether * kRowBytes;
        }
#pragma unroll
        for (int c = 0; c < Epilogue::kSteps; ++c, ring.advance()) {
            ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
            ptx::mbarrier_arrive(shared.full + ring.stage);
        }
    }
}

// A consumer warpgroup: 64 rows of every tile.
template <typename T, bool kGather, bool kAcross, int kStages, typename Epilogue>
__device__ __forceinline__ void consume(const VarlenM& p, const typename Epilogue::Arguments& args,
                                        const Shared<kStages, Tile>& shared, int consumer, int thread) {
    const int steps = p.steps, look_ahead_step = min(kLookAheadStep, steps - 1);
    const bool first_lane = thread % kWarpSize == 0;
    Ring<kStages> ring;
    Epilogue epilogue(args, p, shared.staging, consumer, thread);
    for (int j = 0;; ++j) {
        const Tile tile = shared.tiles.wait(j);
        if (all_lanes(tile.expert == kStop)) break;
        const int first = tile.first + consumer * kRows;
        const int rows = min(tile.end - first, kRows);
        if (all_lanes(rows <= 0)) {
            for (int k = 0; k < steps + Epilogue::kSteps; ++k, ring.advance()) {
                ptx::mbarrier_wait(shared.full + ring.stage, ring.parity);
                if (first_lane) shared.give_back(ring.stage);
            }
            continue;
        }
        epilogue.begin(first, rows);
        float acc[1][kTileN / 2];
        multiply<T, false, kAcross, kGather>(acc, shared, ring, steps, consumer, first_lane, [&](int k) {
            if (k == look_ahead_step) epilogue.look_ahead();
        });
        // The epilogue's own steps: a warp takes a stage once it has arrived, and one of its lanes gives it back.
        auto take = [&] {
            const int stage = ring.stage;
            ptx::mbarrier_wait(shared.full + stage, ring.parity);
            ring.advance();
            return stage;
        };
        epilogue.finish(tile, first, rows, acc[0], shared.stages, take, [&](int stage) { shared.give_back(stage); });
    }
    if (ptx::elect()) ptx::bulk_wait<0>();  // shared memory must outlive the copies that read it
}

constexpr int kVarlenProducerRegisters = 56, kVarlenConsumerRegisters = 224;
static_assert(kVarlenProducerRegisters + kConsumers * kVarlenConsumerRegisters <= (1 + kConsumers) * kLaunchRegisters,
              "otherwise take_registers waits for ever");

// kGather: A's rows are gathered. kAcross: W is stored across the reduction. Epilogue: see EpilogueDefaults.
template <typename T, bool kGather, bool kAcross, int kStages, typename Epilogue>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    varlen_m_kernel(const __grid_constant__ VarlenM p, const __grid_constant__ typename Epilogue::Arguments args) {
    extern __shared__ unsigned char memory[];
    const auto shared = init_shared<kStages, Epilogue::kStagingBytes, Tile>(memory, kGather ? kGatherThreads + 1 : 1);

    const int warpgroup = uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
    if (warpgroup == 0) {
        ptx::give_registers<kVarlenProducerRegisters>();
        if (uniform(thread / kWarpSize) > 0) {
            if (kGather) gather<T, kStages, Epilogue>(p, shared, thread - kWarpSize);
        } else if (ptx::elect()) {
            load<T, kGather, kAcross, kStages, Epilogue>(p, args, shared);
        }
    } else {
        ptx::take_registers<kVarlenConsumerRegisters>();
        consume<T, kGather, kAcross, kStages, Epilogue>(p, args, shared, warpgroup - 1, thread);
    }
    ptx::cluster_sync();  // a block's shared memory must outlive what the other one sends there
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

inline CUtensorMap weights_map(const Weights& w, int num_experts, int box_rows) {
    return make_tensor_map({w.data, w.columns, w.rows, num_experts, w.row_stride, w.expert_stride, box_rows, 1},
                           DType::kBFloat16);
}

// Rows [R, parts * width], contiguous, as [R, parts, width]: a box never runs from one part into the next.
inline CUtensorMap rows_map(const void* data, int64_t rows, int64_t parts, int64_t width, int box_rows) {
    return make_tensor_map({data, width, parts, rows, width, parts * width, 1, box_rows}, DType::kBFloat16);
}

inline VarlenM varlen_m(const Plan& plan, int64_t columns, int tile_columns, int64_t reduced) {
    VarlenM p{};
    p.slots = plan.slots;
    p.top_k = divisor(plan.top_k);
    p.offsets = plan.offsets;
    p.tiles = plan.tiles;
    p.num_m_tiles = plan.num_tiles;
    p.num_n_tiles = static_cast<int>(ceil_div(columns, tile_columns));
    p.steps = static_cast<int>(ceil_div(reduced, kTileK));
    p.group_pairs = 4;
    p.num_rows = plan.num_rows;
    return p;
}

// What every op over an expert's rows relies on.
inline void require_rows_plan(const Needs& needs, const Plan& plan) {
    needs.plan(plan);
    needs.present("tiles", plan.tiles);
    require(plan.num_tiles >= 1, needs.op, ": num_tiles must be positive, got ", plan.num_tiles);
}

template <typename T, bool kGather, bool kAcross, int kStages, typename Epilogue>
void launch_varlen_m(VarlenM p, const typename Epilogue::Arguments& args, const Launch& launch) {
    p.counter = launch.counter;
    launch_clusters<kStages, Epilogue::kStagingBytes>(
        Epilogue::kName, varlen_m_kernel<T, kGather, kAcross, kStages, Epilogue>,
        ceil_div(p.num_m_tiles, kCluster) * p.num_n_tiles, launch, p, args);
}

}  // namespace moe_kernels
