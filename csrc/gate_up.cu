// gate_up: H[r] = x[token(r)] . W[e]^T, A[r] = silu(H_gate[r]) * H_up[r]; see sm90/varlen_m.cuh for the kernel.
//
//     x [T, D] · W [E, 2I, D] (gate rows, then up rows) -> H [R, 2I], A [R, I]
//
// A tile of 256 columns is 128 gate columns and the 128 up columns that belong to them, from two boxes of W: columns j
// and j + 128 of the accumulator are held by one thread, so the activation needs no exchange.

#include "activation.cuh"
#include "gate_up.h"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

constexpr int kPart = kTileN / 2;  // columns of A in a tile

template <typename T>
struct GateUp : EpilogueDefaults {
    static constexpr const char* kName = "gate_up";
    static constexpr int kStagingBytes = kBuffersBytes;

    struct Arguments {
        CUtensorMap h, a;  // [R, 2, I], [R, 1, I]
        void *h_data, *a_data;
        int inner;
    };

    const Arguments& args;
    unsigned char* staging;
    int consumer, thread;
    int buffer = 0;

    __device__ __forceinline__ GateUp(const Arguments& a, const VarlenM&, unsigned char* memory, int c, int t)
        : args(a), staging(memory + c * kBuffers * kChunkBytes), consumer(c), thread(t) {}

    template <bool kAcross>
    static __device__ __forceinline__ void load_weights(const Arguments& args, const CUtensorMap& w, unsigned char* to,
                                                        uint64_t* barrier, const Tile& tile, int k, int half,
                                                        uint16_t blocks) {
        const int n = half * args.inner + tile.i_n() * kPart;
        load_weight_box(w, to + half * kPart * kRowBytes, barrier, k, n, tile.expert, blocks);
    }

    __device__ __forceinline__ void send(const RowsOut& out, const float* values, int first, int rows, int part,
                                         int n) {
        unsigned char* chunk = staging + buffer * kChunkBytes;
        buffer ^= 1;
        through_staging<kBuffers - 1>(
            consumer, thread,
            [&] { write_chunk<T>(ptx::shared_address(chunk), thread / kWarpSize * 16, thread % kWarpSize, values); },
            [&] { send_chunk<T>(out, chunk, thread, first, rows, part, n); });
    }

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char*, Take, Give) {
        const RowsOut h{&args.h, args.h_data, 2 * args.inner, args.inner};
        const RowsOut a{&args.a, args.a_data, args.inner, args.inner};
#pragma unroll
        for (int c = 0; c < kPart / 64; ++c) {
            const int n = tile.i_n() * kPart + 64 * c;
            if (n >= args.inner) break;
            float* gate = acc + 32 * c;
            float* up = acc + kTileN / 4 + 32 * c;
            if (args.h_data != nullptr) {
                send(h, gate, first, rows, 0, n);
                send(h, up, first, rows, 1, n);
            }
            if (args.a_data != nullptr) {
#pragma unroll
                for (int i = 0; i < 32; ++i) gate[i] = silu(gate[i]) * up[i];
                send(a, gate, first, rows, 0, n);
            }
        }
    }
};

}  // namespace

void gate_up(const GateUpArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const Needs needs{GateUp<T>::kName};
    require_rows_plan(needs, plan);
    needs.present("slots", plan.slots);
    needs.multiple("inner", a.inner, 8);
    needs.multiple("reduced", a.reduced, kTileK);  // gathered without a mask
    needs.rows("x", a.x, a.x_stride, plan.num_rows / plan.top_k, sizeof(T));
    needs.weights(a.w, plan.num_experts, 2 * a.inner, a.reduced);
    require(a.h != nullptr || a.a != nullptr, needs.op, ": h and a must not both be null");
    if (a.h != nullptr) needs.aligned("h", a.h);
    if (a.a != nullptr) needs.aligned("a", a.a);

    VarlenM p = varlen_m(plan, a.inner, kPart, a.reduced);
    p.rows = a.x;
    p.row_stride = a.x_stride;
    p.w = weights_map(a.w, plan.num_experts, kPart);
    // An output that nobody reads has no memory; its map is never used.
    GateUp<T>::Arguments args{};
    if (a.h != nullptr) args.h = rows_map(a.h, plan.num_rows, 2, a.inner);
    if (a.a != nullptr) args.a = rows_map(a.a, plan.num_rows, 1, a.inner);
    args.h_data = a.h;
    args.a_data = a.a;
    args.inner = static_cast<int>(a.inner);
    launch_varlen_m<T, true, false, 4, GateUp<T>>(p, args, launch);
}

}  // namespace moe_kernels
