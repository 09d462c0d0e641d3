// grouped_gemm: y[r] = a[r] . W[e] over the rows each expert owns; see sm90/varlen_m.cuh for the kernel.
//
//     a [R, C] · W [E, N, C] (along) or [E, C, N] (across) -> y [R, N]
#include "grouped_gemm.h"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

template <typename T>
struct Store {
    static constexpr const char* kName = "grouped_gemm";
    static constexpr int kBuffers = 2;
    static constexpr int kStagingBytes = kConsumers * kBuffers * kChunkBytes;
    static constexpr int kSteps = 0, kStepBytes = 0;

    struct Arguments {
        CUtensorMap y;  // [R, 1, N]
        void* data;
        int64_t stride;
        int width;
    };

    const Arguments& args;
    unsigned char* staging;
    int consumer, thread;

    __device__ __forceinline__ Store(const Arguments& a, const VarlenM&, unsigned char* memory, int c, int t)
        : args(a), staging(memory + c * kBuffers * kChunkBytes), consumer(c), thread(t) {}

    template <bool kAcross>
    static __device__ __forceinline__ void load_weights(const Arguments&, const CUtensorMap& w, unsigned char* to,
                                                        uint64_t* barrier, const Tile& tile, int k, int half,
                                                        uint16_t blocks) {
        load_weight_half<kAcross>(w, to, barrier, tile, k, half, blocks);
    }

    __device__ __forceinline__ void begin(int, int) {}
    __device__ __forceinline__ void look_ahead() {}
    static __device__ __forceinline__ void load_step(const Arguments&, unsigned char*, uint64_t*, const Tile&, int) {}

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char*, Take, Give) {
        const RowsOut out{&args.y, args.data, args.stride, args.width};
        const int lane = thread % kWarpSize, row = thread / kWarpSize * 16;
#pragma unroll
        for (int c = 0; c < kTileN / 64; ++c) {
            unsigned char* chunk = staging + c % kBuffers * kChunkBytes;
            if (thread == 0) ptx::bulk_wait_read<kBuffers - 1>();
            warpgroup_sync(consumer);
            write_chunk<T>(ptx::shared_address(chunk), row, lane, acc + 32 * c);
            ptx::fence_async_proxy();
            warpgroup_sync(consumer);
            const int n = tile.i_n() * kTileN + 64 * c;
            if (n < args.width) send_chunk<T>(out, chunk, thread, first, rows, 0, n);
            if (thread == 0) ptx::bulk_commit();
        }
    }
};

}  // namespace

void grouped_gemm(const GroupedGemmArguments& a, const Plan& plan, int num_sms, cudaStream_t stream) {
    using T = __nv_bfloat16;
    VarlenM p = varlen_m(plan, a.width, kTileN, a.reduced);
    p.a = make_tensor_map(
        {a.a, static_cast<uint64_t>(a.reduced), static_cast<uint64_t>(plan.num_rows), 1,
         static_cast<uint64_t>(a.a_stride), static_cast<uint64_t>(a.a_stride * plan.num_rows), kTileM, 1},
        DType::kBFloat16);
    p.w = weights_map(a.w, plan.num_experts, a.across ? kTileK : kHalfN);
    const Store<T>::Arguments args{rows_map(a.y, plan.num_rows, 1, a.width), a.y, a.width, static_cast<int>(a.width)};
    if (a.across) {
        launch_varlen_m<T, false, true, 4, Store<T>>(p, args, num_sms, stream);
    } else {
        launch_varlen_m<T, false, false, 4, Store<T>>(p, args, num_sms, stream);
    }
}

}  // namespace moe_kernels
