// grouped_gemm: y[r] = a[r] . W[e] (+ bias[e]) over the rows each expert owns; see sm90/varlen_m.cuh for the kernel.
//
//     a [R, C] · W [E, N, C] (along) or [E, C, N] (across), bias [E, N] -> y [R, N]
//
// The epilogue adds the bias to the accumulators, so the sum is rounded once.
#include "grouped_gemm.h"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

template <typename T>
struct Store : EpilogueDefaults {
    static constexpr const char* kName = "grouped_gemm";
    static constexpr int kStagingBytes = kBuffersBytes;

    struct Arguments {
        CUtensorMap y;  // [R, 1, N]
        void* data;
        const T* bias;        // [E, N], or null
        int64_t bias_stride;  // elements
        int width;
    };

    const Arguments& args;
    unsigned char* staging;
    int consumer, thread;

    __device__ __forceinline__ Store(const Arguments& a, const VarlenM&, unsigned char* memory, int c, int t)
        : args(a), staging(memory + c * kBuffers * kChunkBytes), consumer(c), thread(t) {}

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char*, Take, Give) {
        const RowsOut out{&args.y, args.data, args.width, args.width};
        const int lane = thread % kWarpSize, row = thread / kWarpSize * 16;
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
            through_staging<kBuffers - 1>(
                consumer, thread, [&] { write_chunk<T>(ptx::shared_address(chunk), row, lane, acc + 32 * c); },
                [&] {
                    if (n < args.width) send_chunk<T>(out, chunk, thread, first, rows, 0, n);
                });
        }
    }
};

}  // namespace

void grouped_gemm(const GroupedGemmArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const Needs needs{Store<T>::kName};
    require_rows_plan(needs, plan);
    needs.multiple("width", a.width, 8);
    needs.multiple("reduced", a.reduced, 8);
    needs.aligned("y", a.y);
    needs.rows("a", a.a, a.a_stride, plan.num_rows, sizeof(T));
    if (a.bias != nullptr) needs.rows("bias", a.bias, a.bias_stride, plan.num_experts, sizeof(T));
    needs.weights(a.w, plan.num_experts, a.across ? a.reduced : a.width, a.across ? a.width : a.reduced);

    VarlenM p = varlen_m(plan, a.width, kTileN, a.reduced);
    p.a = make_tensor_map({a.a, a.reduced, plan.num_rows, 1, a.a_stride, 0, kTileM, 1}, DType::kBFloat16);
    p.w = weights_map(a.w, plan.num_experts, a.across ? kTileK : kHalfN);
    const Store<T>::Arguments args{rows_map(a.y, plan.num_rows, 1, a.width), a.y, static_cast<const T*>(a.bias),
                                   a.bias_stride, static_cast<int>(a.width)};
    if (a.across) {
        launch_varlen_m<T, false, true, 4, Store<T>>(p, args, launch);
    } else {
        launch_varlen_m<T, false, false, 4, Store<T>>(p, args, launch);
    }
}

}  // namespace moe_kernels
