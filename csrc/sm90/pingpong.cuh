// The products over an expert's rows with the epilogue of one tile under the products of the next ("ping-pong"): for
// short reductions, of which the epilogue is a large part. What is not said here is as in varlen_m.cuh.
//
// Tiling: C in tiles of 128 rows x kN columns. Each of the two consumer warpgroups makes whole tiles, kN accumulators a
// thread: consumer 0 a block's tiles 0, 2, 4, ..., consumer 1 the others. They take turns at the ring of stages: a
// consumer whose turn it is takes the steps of its tile, passes the turn when the last one has arrived, so that the
// tensor cores have the other's products when its own are done, and goes on to its epilogue. One thread of the producer
// copies (A is contiguous), one draws tiles.
//
// The two blocks of a cluster have neighbouring row tiles and the same columns, and share the weights if they are one
// expert's: a block then fetches 128 + kN / 2 rows of 128 bytes a step, 232 for 208 columns. Neighbouring columns of
// the same rows would share A instead, always: 64 + kN rows, 272. Pairs of two experts' last row tiles, which share
// nothing (336), are one for every four experts: a sixteenth of all for experts of eight row tiles, so 239 on average,
// and 272 is reached where an expert has 1.3. varlen_m.cuh's tile of 256 columns takes 256 rows for 23 % more products.
//
// Steps have one order: that of a block's tiles, and within each of its reduction. Say position for a step's place in
// it; both blocks of a cluster have the same positions, taken by the same consumer. Why waits tell phases apart, and
// end:
// - A parity tells a phase from its two neighbours only, so who waits must know that the one before has ended. The
//   barriers `full`: a consumer waits for a position when it has waited for all earlier ones of its tile and, as it has
//   its turn, the other one for all before. The turn itself: a consumer is passed it only after its last turn, by a
//   consumer that was passed it after that; all warps wait for it and all pass it, so no warp is left behind.
// - Let q be the first position that some warp of the cluster has not given back. The producers copy it: all before it
//   are given back, and its tile is drawn when the tile before is begun. Its consumers come to it: their last epilogue
//   waits for nobody but their own copies, and they have the turn, which is passed before a tile's last position is
//   given back. So q is given back.
#pragma once

#include "sm90/varlen_m.cuh"

namespace moe_kernels {

// The kernel's own barriers: [c] consumer c has its turn, [kBegun] the first block's producer has begun a tile.
constexpr int kBegun = kConsumers, kOwnBarriers = kConsumers + 1;

constexpr int kHalves = kTileM / kRows;  // of a tile, 64 rows each

// A stage of A and kN columns of the weights.
template <int kN, bool kAcross, int kStages>
struct PingPong {
    static_assert(kConsumers == 2 && kN <= 208 && kN % (kAcross ? 64 : 8 * kCluster) == 0);
    static constexpr int kBytes = (kTileM + kN) * kRowBytes;

    // Tile j + 1 is published when tile j is begun, the warps of the cluster that took the step kStages + 1 steps back
    // being done with it: at most kStages + 1 tiles back, tile t. Those of the other consumer have passed the turn for
    // it, so they have read all tiles up to t - 1: t to j + 1 need a place each.
    static_assert(kStages + 3 <= kTileRing);

    // A block fetches half of the weights of a step for both: half of the columns, or, across, of the step.
    static constexpr int kBoxRows = (kAcross ? kTileK : kN) / kCluster;
    static_assert(kBoxRows * kRowBytes % kAlignment == 0);

    static __device__ __forceinline__ void load_half(const CUtensorMap& w, unsigned char* to, uint64_t* barrier,
                                                     const Tile& tile, int k, int half, uint16_t blocks) {
        const int n = tile.i_n() * kN;
        to += half * kBoxRows * kRowBytes;
        if constexpr (kAcross) {
#pragma unroll
            for (int i = 0; i < kN / 64; ++i) {
                load_weight_box(w, to + i * kChunkBytes, barrier, n + 64 * i, k + half * kBoxRows, tile.expert, blocks);
            }
        } else {
            load_weight_box(w, to, barrier, k, n + half * kBoxRows, tile.expert, blocks);
        }
    }
};

// One thread of the first block.
template <int kStages>
__device__ __forceinline__ void draw_tiles(const VarlenM& p, const Shared<kStages, Tile>& shared) {
    Draw next;
    next.number = first_number();
    for (int j = 0;; ++j) {
        next.look_up(p);
        next.find_ends(p);
        shared.tiles.publish(j, next.tiles[0], next.tiles[1]);
        if (next.tiles[0].expert == kStop) break;
        ptx::mbarrier_wait(shared.own + kBegun, j & 1);
        next.draw(p);
    }
}

// One thread of each block.
template <int kN, bool kAcross, int kStages>
__device__ __forceinline__ void produce(const VarlenM& p, const Shared<kStages, Tile>& shared, int rank) {
    using Stage = PingPong<kN, kAcross, kStages>;
    Ring<kStages> ring;
    for (int j = 0;; ++j) {
        shared.tiles.expect(j);
        const Tile tile = shared.tiles.wait(j);
        if (tile.expert == kStop) break;
        if (rank == 0) ptx::mbarrier_arrive(shared.own + kBegun, kWarpgroup / kWarpSize);
        for (int k = 0; k < p.steps; ++k, ring.advance()) {
            unsigned char* a = shared.stages + ring.stage * Stage::kBytes;
            uint64_t* barrier = shared.full + ring.stage;
            ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
            if (tile.expert == kUnused) {
                ptx::mbarrier_arrive(barrier);
                continue;
            }
            ptx::mbarrier_arrive_expect(barrier, Stage::kBytes);
            ptx::tma_load_3d(a, &p.a, barrier, k * kTileK, tile.first, 0);
            if (tile.shared()) {
                Stage::load_half(p.w, a + kABytes, barrier, tile, k * kTileK, rank, kBothBlocks);
            } else {
#pragma unroll
                for (int half = 0; half < kCluster; ++half) {
                    Stage::load_half(p.w, a + kABytes, barrier, tile, k * kTileK, half, 0);
                }
            }
        }
    }
}

// A consumer's place in the order of steps; in fewer registers than Ring.
template <int kStages>
struct Position {
    unsigned at;
    __device__ __forceinline__ int stage(int back = 0) const { return (at - back) % kStages; }
    __device__ __forceinline__ uint32_t parity() const { return at / kStages & 1; }
};

// acc = the products of a tile's steps, of its first kUsed halves; see multiply.cuh. pass() is called when the last
// step has arrived.
template <typename T, int kN, bool kAcross, int kUsed, int kStages, typename Pass>
__device__ __forceinline__ void multiply_halves(float (&acc)[kHalves][kN / 2], const Shared<kStages, Tile>& shared,
                                                Position<kStages>& position, int steps, bool first_lane, Pass pass) {
    for (int k = 0; k < steps; ++k, ++position.at) {
        const int stage = position.stage();
        const unsigned char* a = shared.stages + stage * PingPong<kN, kAcross, kStages>::kBytes;
        ptx::mbarrier_wait(shared.full + stage, position.parity());
        if (k == steps - 1) pass();
        const uint64_t desc_a = Operand<false>::descriptor(a);
        const uint64_t desc_b = Operand<kAcross>::descriptor(a + kABytes);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTileK / 16; ++i) {
#pragma unroll
            for (int half = 0; half < kUsed; ++half) {
                ptx::Wgmma<T, kN, false, kAcross>::run(acc[half],
                                                       desc_a + i * Operand<false>::kNext + half * (kChunkBytes >> 4),
                                                       desc_b + i * Operand<kAcross>::kNext, (k | i) != 0);
            }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the step before this one has read its operands
        if (k > 0 && first_lane) shared.give_back(position.stage(1));
    }
#pragma unroll
    for (int half = 0; half < kUsed; ++half) ptx::wgmma_wait_all(acc[half]);
    if (first_lane) shared.give_back(position.stage(1));
}

// A consumer warpgroup: every other tile.
template <typename T, int kN, bool kAcross, int kStages, typename Epilogue>
__device__ __forceinline__ void consume_in_turn(const VarlenM& p, const typename Epilogue::Arguments& args,
                                                const Shared<kStages, Tile>& shared, int consumer, int thread) {
    const int steps = p.steps;
    const bool first_lane = thread % kWarpSize == 0;
    Epilogue epilogue(args, p, shared.staging, consumer, thread);
    for (int j = 0;; ++j) {
        const Tile tile = shared.tiles.wait(j);
        if (all_lanes(tile.expert == kStop)) break;
        if (j % kConsumers != consumer) continue;
        Position<kStages> position{static_cast<unsigned>(j) * steps};
        const int rows = min(tile.end - tile.first, kTileM);
        if (rows > 0) epilogue.begin(tile);
        if (j > 0) ptx::mbarrier_wait(shared.own + consumer, (j - 1) / kConsumers & 1);
        auto pass = [&] {
            __syncwarp();  // all lanes have waited
            if (first_lane) ptx::mbarrier_arrive(shared.own + (consumer ^ 1));
        };
        if (rows <= 0) {
#pragma unroll 1
            for (int k = 0; k < steps; ++k, ++position.at) {
                ptx::mbarrier_wait(shared.full + position.stage(), position.parity());
                if (k == steps - 1) pass();
                __syncwarp();
                if (first_lane) shared.give_back(position.stage());
            }
            continue;
        }
        float acc[kHalves][kN / 2];
        if (rows > kRows) {
            multiply_halves<T, kN, kAcross, kHalves>(acc, shared, position, steps, first_lane, pass);
        } else {
            multiply_halves<T, kN, kAcross, 1>(acc, shared, position, steps, first_lane, pass);
        }
        epilogue.send(tile, rows, acc);
    }
    if (thread < kWarpSize && ptx::elect()) ptx::bulk_wait<0>();  // shared memory must outlive the copies that read it
}

constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= kBlockThreads * 168,
              "what a block of so many threads starts with: otherwise take_registers waits for ever");

// kAcross: W is stored across the reduction. Epilogue: kName, kStagingBytes, Arguments, Epilogue(args, p, staging,
// consumer, thread), one for each thread of a consumer, and for each tile with rows begin(tile), before its products,
// and send(tile, rows, acc), with what they gave.
template <typename T, int kN, bool kAcross, int kStages, typename Epilogue>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    pingpong_kernel(const __grid_constant__ VarlenM p, const __grid_constant__ typename Epilogue::Arguments args) {
    using Stage = PingPong<kN, kAcross, kStages>;
    extern __shared__ unsigned char memory[];
    const auto shared = init_shared<kStages, Epilogue::kStagingBytes, Tile, Stage::kBytes, 1, kOwnBarriers>(memory, 1);

    const int warpgroup = uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
    if (warpgroup == 0) {
        ptx::give_registers<kProducerRegisters>();
        const int rank = ptx::cluster_rank();
        if (thread < kWarpSize && ptx::elect()) produce<kN, kAcross>(p, shared, rank);
        if (thread == kWarpSize && rank == 0) draw_tiles(p, shared);
    } else {
        ptx::take_registers<kConsumerRegisters>();
        consume_in_turn<T, kN, kAcross, kStages, Epilogue>(p, args, shared, warpgroup - 1, thread);
    }
    ptx::cluster_sync();  // a block's shared memory must outlive what the other one sends there
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

template <typename T, int kN, bool kAcross, int kStages, typename Epilogue>
void launch_pingpong(VarlenM p, const typename Epilogue::Arguments& args, const Launch& launch) {
    using Stage = PingPong<kN, kAcross, kStages>;
    p.counter = launch.counter;
    launch_clusters<kStages, Epilogue::kStagingBytes, Stage::kBytes>(
        Epilogue::kName, pingpong_kernel<T, kN, kAcross, kStages, Epilogue>,
        ceil_div(p.num_m_tiles, kCluster) * p.num_n_tiles, launch, p, args);
}

}  // namespace moe_kernels
