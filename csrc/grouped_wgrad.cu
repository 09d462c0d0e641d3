// grouped_wgrad: dW[e] = sum over the rows r of expert e of lhs(r)^T . rhs(r), one side gathered by token or none.
//
//     lhs [R or T, M], rhs [R or T, N] -> dW [E, M, N]
//
// Tiling as in sm90/varlen_m.cuh, but the reduction runs over an expert's rows, 64 at a time, so both operands lie
// across it. A block makes 128 columns of the gathered side times 256 of the contiguous side; a cluster's two blocks
// make neighbouring 128 columns of the gathered side and share the contiguous tile, each fetching half of it for both.
// The contiguous side comes by the copy engine, the gathered side by cp.async of the producer's 128 threads: fewer of
// those in this orientation. Where the gathered side is rhs the accumulator is dW transposed, and is turned on its way
// to shared memory. In an expert's last, ragged step both sides come by cp.async, which puts zeros in place of rows
// past the end: those belong to the next expert, or to nobody and may hold anything. An expert without rows takes one
// step of zeros. One block adds up a tile from first row to last, so the sum has one order. Where nothing is gathered,
// one side comes as a gathered one would, row r for row r.

#include <limits>
#include <type_traits>

#include "grouped_wgrad.h"
#include "sm90/chunk.cuh"
#include "sm90/multiply.cuh"
#include "sm90/pipeline.cuh"
#include "tensor_map.h"

namespace moe_kernels {
namespace {

constexpr const char* kName = "grouped_wgrad";
constexpr int kStages = 4;

struct Wgrad {
    CUtensorMap contiguous_map;  // [1, R, contiguous_width], box [1, 64, 64]
    CUtensorMap dw;              // [E, M, N], box [1, 64, 128 bytes]
    const void *gathered, *contiguous;
    int gathered_stride, contiguous_stride;  // elements
    int gathered_width, contiguous_width, m, n;
    const int* offsets;
    const int* slots;                         // null: the gathered side's row is the row itself
    Divisor top_k;                            // then 1
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

    __device__ __forceinline__ void look_up(const Wgrad& p) {
        const int per_expert = p.num_pairs * p.num_columns;
        const int expert = number / per_expert, within = number % per_expert;
        tile = {kStop, 0, 0, 0, 0};
        if (expert < p.num_experts) {
            tile = {expert, __ldg(p.offsets + expert), __ldg(p.offsets + expert + 1),
                    static_cast<short>(within % p.num_pairs), static_cast<short>(within / p.num_pairs)};
        }
    }
};

// A producer thread's share of a [64, 64 * kColumnBlocks] tile: which 16-byte pieces of which rows.
//
// kPieces lanes cover a row, so a warp copies kRowsAtOnce rows at a time, in kTurns turns, sixteen rows in all. Lane
// i < 16 keeps the number (token or row) of the warp's i-th row.
template <int kColumnBlocks>
struct Side {
    static constexpr int kPieces = 8 * kColumnBlocks;        // 16 or 32
    static constexpr int kRowsAtOnce = kWarpSize / kPieces;  // 2 or 1
    static constexpr int kTurns = 16 / kRowsAtOnce;          // 8 or 16

    int lane, first_row;  // of turn 0
    uint32_t at[2];       // where its piece goes in even and odd turns, apart from the turn's rows

    __device__ __forceinline__ Side(int warp, int l) : lane(l), first_row(kRowsAtOnce * warp + l / kPieces) {
        const int piece = lane % kPieces;
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int row = first_row + odd * 4 * kRowsAtOnce;
            at[odd] = piece / 8 * kChunkBytes + swizzled(row, piece % 8) - odd * 4 * kRowsAtOnce * kRowBytes;
        }
    }

    // The row of the tile that lane i < 16 keeps the number of.
    static __device__ __forceinline__ int kept_row(int warp, int i) {
        return kRowsAtOnce * warp + i % kRowsAtOnce + 4 * kRowsAtOnce * (i / kRowsAtOnce);
    }

    __device__ __forceinline__ int column() const { return lane % kPieces * 8; }

    // `data`: this thread's column of the tensor's row 0. kWhole: every row and column exists; else a row numbered -1
    // and a column that is not `inside` become zeros.
    template <bool kWhole, typename T>
    __device__ __forceinline__ void copy(uint32_t to, const T* data, int stride, int number, bool inside) const {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int row = __shfl_sync(kFullWarp, number, turn * kRowsAtOnce + lane / kPieces);
            const uint32_t address = to + at[turn % 2] + turn * 4 * kRowsAtOnce * kRowBytes;
            if (kWhole) {
                ptx::cp_async_16(address, data + static_cast<int64_t>(row) * stride);
            } else {
                const bool exists = inside && row >= 0;
                ptx::cp_async_16_or_zero(address, exists ? data + static_cast<int64_t>(row) * stride : data, exists);
            }
        }
    }
};

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
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int g = 16 * warp + lane / 4 + 8 * (i / 2 % 2), c = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        const int row = kTransposed ? c : g, column = kTransposed ? g : c;
        const uint32_t at = column / 32 * kChunkBytes + swizzled(row, column % 32 / 4) + column % 4 * 4;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(chunks + at), "f"(values[i]) : "memory");
    }
}

template <typename T, typename Out, bool kGatherLhs>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    grouped_wgrad_kernel(const __grid_constant__ Wgrad p) {
    extern __shared__ unsigned char memory[];
    const auto shared = init_shared<kStages, kBuffersBytes, WgradTile>(memory, kWarpgroup + 1);
    auto& tiles = shared.tiles;

    const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int rank = ptx::cluster_rank();
    Ring<kStages> ring;

    if (warpgroup == 0) {
        give_registers<88>();
        const bool draws = thread == 0 && rank == 0;
        WgradDraw next;
        if (thread == 0) tiles.expect(0);
        if (draws) {
            next.number = first_number();
            next.look_up(p);
            tiles.publish(0, next.tile, next.tile);
        }
        const Side<kTileM / 64> narrow(warp, lane);
        const Side<kTileN / 64> wide(warp, lane);
        const int kept_narrow = narrow.kept_row(warp, lane % 16), kept_wide = wide.kept_row(warp, lane % 16);
        const T* gathered = static_cast<const T*>(p.gathered) + narrow.column();
        const T* contiguous = static_cast<const T*>(p.contiguous) + wide.column();
        // The slot of this lane's row of the step that begins at `row`; a row past the end repeats the last one.
        auto slot_of = [&](const WgradTile& of, int row) {
            if (of.begin >= of.end) return 0;
            const int mine = min(row + kept_narrow, of.end - 1);
            return p.slots == nullptr ? mine : __ldg(p.slots + mine);
        };
        WgradTile tile = tiles.wait(0);
        int slot = slot_of(tile, tile.begin);
        for (int j = 0; tile.expert != kStop; ++j) {
            const int g = (kCluster * tile.pair + rank) * kTileM, c = tile.column * kTileN;
            const bool inside = g + narrow.column() < p.gathered_width;
            const bool all_columns = g + kTileM <= p.gathered_width;
            const int steps = tile.steps();
            WgradTile coming;
            if (thread == 0) tiles.expect(j + 1);
            for (int k = 0; k < steps; ++k, ring.advance()) {
                const int row = tile.begin + k * kTileK;
                const int token = p.top_k.divide(slot);
                if (draws) {
                    if (k == 0) next.draw(p);
                    if (k == steps / 3) next.look_up(p);
                    if (k == steps * 2 / 3) tiles.publish(j + 1, next.tile, next.tile);
                }
                if (k < steps - 1) {
                    slot = slot_of(tile, row + kTileK);
                } else {
                    coming = tiles.wait(j + 1);
                    slot = slot_of(coming, coming.begin);
                }
                const bool whole = row + kTileK <= tile.end;
                unsigned char* a = shared.stages + ring.stage * kStageBytes;
                unsigned char* b = a + kABytes;
                uint64_t* barrier = shared.full + ring.stage;
                ptx::mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
                if (thread == 0) {
                    ptx::mbarrier_arrive_expect(barrier, whole ? kBBytes : 0);
                    if (whole) {
#pragma unroll
                        for (int i = 0; i < kTileN / 64 / kCluster; ++i) {
                            const int block = rank * (kTileN / 64 / kCluster) + i;
                            ptx::tma_load_3d_multicast(b + block * kChunkBytes, &p.contiguous_map, barrier,
                                                       c + 64 * block, row, 0, kBothBlocks);
                        }
                    }
                }
                if (whole && all_columns) {
                    narrow.template copy<true>(ptx::shared_address(a), gathered + g, p.gathered_stride, token, true);
                } else {
                    const int rows = tile.end - row;  // of this step; 64 or more is all
                    narrow.template copy<false>(ptx::shared_address(a), gathered + g, p.gathered_stride,
                                                kept_narrow < rows ? token : -1, inside);
                    if (!whole) {
                        wide.template copy<false>(ptx::shared_address(b), contiguous + c, p.contiguous_stride,
                                                  kept_wide < rows ? row + kept_wide : -1,
                                                  c + wide.column() < p.contiguous_width);
                    }
                }
                ptx::mbarrier_arrive_after_copies(barrier);
            }
            tile = coming;
        }
    } else {
        take_registers<208>();
        const int consumer = warpgroup - 1;
        unsigned char* chunks = shared.staging + consumer * kBuffers * kChunkBytes;
        for (int j = 0;; ++j) {
            const WgradTile tile = tiles.wait(j);
            if (tile.expert == kStop) break;
            float acc[kTileN / 2];
            multiply<T, true, true, true>(acc, shared, ring, tile.steps(), consumer, lane == 0, [](int) {});
            const int g = (kCluster * tile.pair + rank) * kTileM + consumer * kRows;
            constexpr bool kFloat = std::is_same_v<Out, float>;
            constexpr int kAtOnce = kFloat ? kBuffers : 1;  // chunks that a block of 64 columns takes
#pragma unroll
            for (int i = 0; i < kTileN / 64; ++i) {
                unsigned char* chunk = chunks + (kFloat ? 0 : i % kBuffers * kChunkBytes);
                const uint32_t to = ptx::shared_address(chunk);
                auto write = [&] {
                    if constexpr (kFloat) {
                        write_float_chunks<!kGatherLhs>(to, warp, lane, acc + 32 * i);
                    } else if constexpr (kGatherLhs) {
                        write_chunk<T>(to, warp * 16, lane, acc + 32 * i);
                    } else {
                        write_chunk_transposed<T>(to, warp, lane, acc + 32 * i);
                    }
                };
                auto send = [&] {
                    if (thread != 0) return;
                    const int c = tile.column * kTileN + 64 * i;
                    const int row = kGatherLhs ? g : c, column = kGatherLhs ? c : g;
#pragma unroll
                    for (int part = 0; part < kAtOnce; ++part) {
                        if (row < p.m && column + 32 * part < p.n) {
                            ptx::tma_store_3d(&p.dw, chunk + part * kChunkBytes, column + 32 * part, row, tile.expert);
                        }
                    }
                };
                through_staging<kBuffers / kAtOnce - 1>(consumer, thread, write, send);
            }
        }
        if (thread == 0) ptx::bulk_wait<0>();  // shared memory must outlive the copies that read it
    }
    ptx::cluster_sync();  // a block's shared memory must outlive what the other one sends there
}

template <typename T, typename Out, bool kGatherLhs>
void launch_wgrad(const Wgrad& p, const Launch& launch) {
    launch_clusters<kStages, kBuffersBytes>(kName, grouped_wgrad_kernel<T, Out, kGatherLhs>,
                                            int64_t{p.num_experts} * p.num_pairs * p.num_columns, launch, p);
}

}  // namespace

void grouped_wgrad(const GroupedWgradArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const bool in_float = a.dw_dtype == DType::kFloat32;
    const int64_t gathered_stride = a.gather_lhs ? a.lhs_stride : a.rhs_stride;
    const int64_t contiguous_stride = a.gather_lhs ? a.rhs_stride : a.lhs_stride;
    const Needs needs{kName};
    needs.plan(plan);
    needs.multiple("m", a.m, 8);
    needs.multiple("n", a.n, 8);
    const int top_k = plan.slots == nullptr ? 1 : plan.top_k;
    const int64_t tokens = plan.num_rows / top_k;
    const int64_t lhs_rows = a.gather_lhs ? tokens : plan.num_rows, rhs_rows = a.gather_lhs ? plan.num_rows : tokens;
    needs.rows("lhs", a.lhs, a.lhs_stride, lhs_rows, sizeof(T));
    needs.rows("rhs", a.rhs, a.rhs_stride, rhs_rows, sizeof(T));
    needs.aligned("dw", a.dw);
    require(in_float || a.dw_dtype == DType::kBFloat16, kName, ": dw_dtype must be bfloat16 or float32");
    // Strides are ints, numbers of tiles shorts.
    constexpr int64_t kFarthest = std::numeric_limits<int>::max();
    require((lhs_rows == 1 || a.lhs_stride <= kFarthest) && (rhs_rows == 1 || a.rhs_stride <= kFarthest), kName,
            ": lhs and rhs must have rows less than 2**31 elements apart");
    require(std::max(a.m, a.n) <= 1 << 22, kName, ": m and n must be at most 2**22, got ", a.m, " and ", a.n);

    Wgrad p{};
    p.gathered = a.gather_lhs ? a.lhs : a.rhs;
    p.contiguous = a.gather_lhs ? a.rhs : a.lhs;
    p.gathered_stride = static_cast<int>(gathered_stride);
    p.contiguous_stride = static_cast<int>(contiguous_stride);
    p.gathered_width = static_cast<int>(a.gather_lhs ? a.m : a.n);
    p.contiguous_width = static_cast<int>(a.gather_lhs ? a.n : a.m);
    p.contiguous_map = make_tensor_map(
        {p.contiguous, p.contiguous_width, plan.num_rows, 1, contiguous_stride, 0, kTileK, 1}, DType::kBFloat16);
    p.dw = make_tensor_map({a.dw, a.n, a.m, plan.num_experts, a.n, a.m * a.n, kRows, 1}, a.dw_dtype);
    p.offsets = plan.offsets;
    p.slots = plan.slots;
    p.top_k = divisor(top_k);
    p.m = static_cast<int>(a.m);
    p.n = static_cast<int>(a.n);
    p.num_experts = plan.num_experts;
    p.num_pairs = static_cast<int>(ceil_div(p.gathered_width, kCluster * kTileM));
    p.num_columns = static_cast<int>(ceil_div(p.contiguous_width, kTileN));
    p.counter = launch.counter;
    if (a.gather_lhs) {
        in_float ? launch_wgrad<T, float, true>(p, launch) : launch_wgrad<T, T, true>(p, launch);
    } else {
        in_float ? launch_wgrad<T, float, false>(p, launch) : launch_wgrad<T, T, false>(p, launch);
    }
}

}  // namespace moe_kernels
