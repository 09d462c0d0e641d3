// grouped_gemm: y[r] = a[r] . W[e] (+ bias[e]) over the rows each expert owns; see sm90/varlen_m.cuh and
// sm90/pingpong.cuh for the kernels.
//
//     a [R, C] · W [E, N, C] (along) or [E, C, N] (across), bias [E, N] -> y [R, N]
//
// The epilogue adds the bias to the accumulators, so the sum is rounded once. Every element of y is summed up in the
// same order by all kernels.
#include <type_traits>

#include "grouped_gemm.h"
#include "sm90/pingpong.cuh"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

using T = __nv_bfloat16;

constexpr int kStages = 4;

struct StoreArguments {
    CUtensorMap y;  // [R, 1, N]
    void* data;
    const T* bias;        // [E, N], or null
    int64_t bias_stride;  // elements
    int width;
};

// 64 rows of 256 columns, nothing else to do meanwhile.
struct StoreTogether : EpilogueDefaults {
    static constexpr const char* kName = "grouped_gemm";
    static constexpr int kStagingBytes = kBuffersBytes;

    using Arguments = StoreArguments;

    const Arguments& args;
    unsigned char* staging;
    int thread;

    __device__ __forceinline__ StoreTogether(const Arguments& a, const VarlenM&, unsigned char* memory, int c, int t)
        : args(a), staging(memory + c * kBuffers * kChunkBytes), thread(t) {}

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char*, Take, Give) {
        const RowsOut out{&args.y, args.data, args.width, args.width};
        const int lane = thread % kWarpSize, row = uniform(thread / kWarpSize) * kWarpRows;
        const bool biased = args.bias != nullptr;
        uint32_t bias[kTileN / 64];  // a pair of columns of each chunk, all loaded at once
        if (biased) {
            const T* of_expert = args.bias + tile.expert * args.bias_stride;
#pragma unroll
            for (int c = 0; c < kTileN / 64; ++c) {
                const int n = tile.i_n() * kTileN + 64 * c + 2 * lane;
                bias[c] = n < args.width ? __ldg(reinterpret_cast<const uint32_t*>(of_expert + n)) : 0;
            }
        }
#pragma unroll
        for (int c = 0; c < kTileN / 64; ++c) {
            unsigned char* chunk = staging + c % kBuffers * kChunkBytes;
            const int n = tile.i_n() * kTileN + 64 * c;
            if (biased) add_bias<T>(acc + 32 * c, bias[c], lane);
            through_staging_of_warp<kBuffers - 1>(
                [&] { write_chunk<T>(ptx::shared_address(chunk), row, lane, acc + 32 * c); },
                [&] {
                    if (n < args.width) {
                        send_rows<T>(lane, first + row, rows - row,
                                     [&](auto send) { send(out, chunk + row * kRowBytes, 0, n); });
                    }
                });
        }
    }
};

// 128 rows of kN columns, under the other consumer's products.
template <int kN>
struct StoreInTurn {
    static constexpr const char* kName = StoreTogether::kName;
    using Arguments = StoreArguments;
    static constexpr int kColumnChunks = (kN + 63) / 64;
    static constexpr int kChunks = kColumnChunks % 2 == 0 ? 2 : 3;  // of staging memory, in turn all through a half
    static_assert(kColumnChunks % kChunks == 0);
    static constexpr int kBiasBytes = 512;  // of a tile's columns
    static constexpr int kConsumerBytes = kChunks * kChunkBytes + kBiasBytes;
    static constexpr int kStagingBytes = kConsumers * kConsumerBytes;
    static_assert(kN * sizeof(T) <= kBiasBytes);

    const Arguments& args;
    unsigned char* staging;
    unsigned char* bias;
    int consumer, thread;
    bool first_warp;  // which sends

    __device__ __forceinline__ StoreInTurn(const Arguments& a, const VarlenM&, unsigned char* memory, int c, int t)
        : args(a),
          staging(memory + c * kChunks * kChunkBytes),
          bias(memory + kConsumers * kChunks * kChunkBytes + c * kBiasBytes),
          consumer(c),
          thread(t),
          first_warp(uniform(t / kWarpSize) == 0) {}

    // The bias, a pair of columns a thread. The threads meet between this and their reads.
    __device__ __forceinline__ void begin(const Tile& tile) const {
        const int n = tile.i_n() * kN + 2 * thread;
        if (args.bias == nullptr || thread >= kN / 2 || n >= args.width) return;
        const T* of_expert = args.bias + tile.expert * args.bias_stride;
        reinterpret_cast<uint32_t*>(bias)[thread] = __ldg(reinterpret_cast<const uint32_t*>(of_expert + n));
    }

    // Sums go from the accumulators to shared memory: changed where they are, they would keep ptxas from running one
    // product after the other without a wait.
    template <bool kBiased>
    __device__ __forceinline__ void write_chunk(uint32_t chunk, const float* acc, int c, int groups) const {
        const int lane = thread % kWarpSize, row = thread / kWarpSize * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
        const uint32_t to = chunk + swizzled(row, lane >> 4);
#pragma unroll
        for (int j = 0; j < groups; j += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float low = acc[4 * j + 2 * i], high = acc[4 * j + 2 * i + 1];
                if (kBiased) {
                    const uint32_t word = reinterpret_cast<const uint32_t*>(bias)[32 * c + 4 * (j + i / 2) + lane % 4];
                    const float2 more = to_float2(word, static_cast<const T*>(nullptr));
                    low += more.x;
                    high += more.y;
                }
                words[i] = from_floats(low, high, static_cast<const T*>(nullptr));
            }
            ptx::stmatrix_x4(to ^ (j << 4), words);  // swizzled(row, j + (lane >> 4)), as j is even
        }
    }

    // All threads of the consumer, for fewer columns than a box, too, and in few registers.
    __device__ __forceinline__ void send_chunk(const unsigned char* chunk, int first, int rows, int n,
                                               int groups) const {
        if (groups == 8 && rows == kRows) {
            if (first_warp && ptx::elect()) ptx::tma_store_3d(&args.y, chunk, n, 0, first);
            return;
        }
#pragma unroll 1
        for (int i = thread; i < kRows * groups; i += kWarpgroup) {
            const int row = i / groups, piece = i % groups;
            if (row >= rows) break;
            if (n + piece * 8 >= args.width) continue;
            T* to = static_cast<T*>(args.data) + static_cast<int64_t>(first + row) * args.width + n + piece * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(chunk + swizzled(row, piece));
        }
    }

    __device__ __forceinline__ void send(const Tile& tile, int rows, const float (&acc)[kHalves][kN / 2]) const {
        const bool biased = args.bias != nullptr;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const int first = tile.first + half * kRows, rest = rows - half * kRows;
            if (rest <= 0) break;
#pragma unroll
            for (int c = 0; c < kColumnChunks; ++c) {
                const int n = tile.i_n() * kN + 64 * c, groups = c < kN / 64 ? 8 : kN % 64 / 8;
                unsigned char* chunk = staging + c % kChunks * kChunkBytes;
                auto write = [&] {
                    const uint32_t to = ptx::shared_address(chunk);
                    if (biased) {
                        write_chunk<true>(to, acc[half] + 32 * c, c, groups);
                    } else {
                        write_chunk<false>(to, acc[half] + 32 * c, c, groups);
                    }
                };
                auto send = [&] {
                    if (n < args.width) send_chunk(chunk, first, min(rest, kRows), n, groups);
                };
                through_staging<kChunks - 1>(
                    first_warp && ptx::elect(), [&] { warpgroup_sync(consumer); }, write, send);
            }
        }
    }
};

// Clocks of the tensor cores for a row of tiles, with a rest for each tile. In turn that is half of what an epilogue is
// longer than the other consumer's products.
int64_t clocks(int64_t width, int64_t steps, int columns, bool in_turn) {
    constexpr int64_t kEpilogue = 2450;  // as measured in the other kernel: 64 rows of 256 columns
    const int64_t products = steps * 4 * columns;
    const int64_t rest = in_turn ? std::max<int64_t>(2 * kEpilogue - products, 0) / 2 : kEpilogue;
    return ceil_div(width, columns) * (products + rest);
}

}  // namespace

// Columns of a tile: kTileN is the kernel whose consumers work together, fewer the one where they take turns. Each of
// its products needs an eighth to a sixth more bytes from L2, so it has to save 2 %: not where the reduction is long.
int grouped_gemm_tile_columns(int64_t width, int64_t reduced, bool across) {
    const int64_t steps = ceil_div(reduced, kTileK);
    int best = kTileN;
    int64_t fewest = clocks(width, steps, kTileN, false) * 49 / 50;
    for (const int columns : {208, 192}) {
        const int64_t now = clocks(width, steps, columns, true);
        if (now >= fewest || (across && columns % 64 != 0)) continue;
        best = columns;
        fewest = now;
    }
    return best;
}

namespace {

template <bool kAcross>
void launch_for(const GroupedGemmArguments& a, const Plan& plan, const Launch& launch) {
    StoreArguments args{{}, a.y, static_cast<const T*>(a.bias), a.bias_stride, static_cast<int>(a.width)};
    const int columns = grouped_gemm_tile_columns(a.width, a.reduced, kAcross);
    VarlenM p = varlen_m(plan, a.width, columns, a.reduced);
    p.a = make_tensor_map({a.a, a.reduced, plan.num_rows, 1, a.a_stride, 0, kTileM, 1}, DType::kBFloat16);
    auto in_turn = [&](auto width) {
        constexpr int kN = decltype(width)::value;
        p.w = weights_map(a.w, plan.num_experts, PingPong<kN, kAcross, kStages>::kBoxRows);
        args.y = rows_map(a.y, plan.num_rows, 1, a.width, kRows);
        launch_pingpong<T, kN, kAcross, kStages, StoreInTurn<kN>>(p, args, launch);
    };
    if (columns == kTileN) {
        p.w = weights_map(a.w, plan.num_experts, kAcross ? kTileK : kHalfN);
        args.y = rows_map(a.y, plan.num_rows, 1, a.width, kWarpRows);
        launch_varlen_m<T, false, kAcross, kStages, StoreTogether>(p, args, launch);
    } else if (kAcross || columns == 192) {
        in_turn(std::integral_constant<int, 192>());
    } else if constexpr (!kAcross) {
        in_turn(std::integral_constant<int, 208>());
    }
}

}  // namespace

void grouped_gemm(const GroupedGemmArguments& a, const Plan& plan, const Launch& launch) {
    const Needs needs{StoreTogether::kName};
    require_rows_plan(needs, plan);
    needs.multiple("width", a.width, 8);
    needs.multiple("reduced", a.reduced, 8);
    needs.aligned("y", a.y);
    needs.rows("a", a.a, a.a_stride, plan.num_rows, sizeof(T));
    if (a.bias != nullptr) needs.rows("bias", a.bias, a.bias_stride, plan.num_experts, sizeof(T));
    needs.weights(a.w, plan.num_experts, a.across ? a.reduced : a.width, a.across ? a.width : a.reduced);

    a.across ? launch_for<true>(a, plan, launch) : launch_for<false>(a, plan, launch);
}

}  // namespace moe_kernels
