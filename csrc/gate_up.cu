// gate_up: H[r] = x[token(r)] . W[e]^T (+ bias[e]), A[r] = act(H[r]); see sm90/varlen_m.cuh for the kernel.
//
//     x [T, D] · W [E, N, D] (along) or [E, D, N] (across) -> H [R, N], A [R, I];  N = 2I with a gate, else I
//
// A tile of 256 columns of the product is, with H as
//     halves   128 gate columns and the 128 up columns that belong to them, from boxes of W on their own: columns j and
//              j + 128 of the accumulator are held by one thread, so the activation needs no exchange
//     in turn  128 pairs: a thread has gate and up side by side. Its columns of A then lie four apart, and the lanes of
//              a quad exchange them for neighbours, which is how a matrix goes to shared memory
//     plain    256 columns of A
// Each layout, activation and storage of W is a kernel of its own; bias, alpha and limit are run-time arguments.

#include "activation.cuh"
#include "gate_up.h"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

// Of eight columns the lanes of a quad hold q (low half) and q + 4 (high half), q = lane % 4; comes back as 2q, 2q + 1.
__device__ __forceinline__ uint32_t as_neighbours(uint32_t word, int lane) {
    const int from = (lane & ~3) | (2 * lane & 3);
    const uint32_t even = __shfl_sync(kFullWarp, word, from), odd = __shfl_sync(kFullWarp, word, from + 1);
    return __byte_perm(even, odd, lane & 2 ? 0x7632 : 0x5410);
}

// write_chunk for 32 results that come from pairs of accumulators: 4j and 4j + 1 gave values[2j], a column of the upper
// row, 4j + 2 and 4j + 3 gave values[2j + 1], eight rows below.
template <typename T>
__device__ __forceinline__ void write_chunk_of_pairs(uint32_t chunk, int row, int lane, const float* values) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = 4 * (j + i / 2) + i % 2;
            words[i] = as_neighbours(from_floats(values[at], values[at + 2], static_cast<const T*>(nullptr)), lane);
        }
        ptx::stmatrix_x4(chunk + swizzled(row + (lane >> 3 & 1) * 8 + (lane & 7), j + (lane >> 4)), words);
    }
}

template <typename T, Activation kActivation, Layout kLayout>
struct GateUp : EpilogueDefaults {
    static constexpr const char* kName = "gate_up";
    static constexpr int kStagingBytes = kBuffersBytes;
    static constexpr int kColumns = kTileN / kRatioOf<kLayout>;  // of A in a tile

    struct Arguments {
        CUtensorMap h, a;  // [R, parts, N / parts], [R, 1, I]
        void *h_data, *a_data;
        const T* bias;
        int inner;
        float alpha, limit;
    };

    const Arguments& args;
    unsigned char* staging;
    int lane, row;  // the warp's first
    int buffer = 0;

    __device__ __forceinline__ GateUp(const Arguments& a, const VarlenM&, unsigned char* memory, int c, int t)
        : args(a),
          staging(memory + c * kBuffers * kChunkBytes),
          lane(t % kWarpSize),
          row(uniform(t / kWarpSize) * kWarpRows) {}

    template <bool kAcross>
    static __device__ __forceinline__ void load_weights(const Arguments& args, const CUtensorMap& w, unsigned char* to,
                                                        uint64_t* barrier, const Tile& tile, int k, int half,
                                                        uint16_t blocks) {
        if constexpr (kLayout != Layout::kHalves) {
            load_weight_half<kAcross>(w, to, barrier, tile, k, half, blocks);
        } else {
            const int n = half * args.inner + tile.i_n() * kColumns;
            to += half * kColumns * kRowBytes;
            if constexpr (kAcross) {
#pragma unroll
                for (int i = 0; i < kColumns / 64; ++i) {
                    load_weight_box(w, to + i * kChunkBytes, barrier, n + 64 * i, k, tile.expert, blocks);
                }
            } else {
                load_weight_box(w, to, barrier, k, n, tile.expert, blocks);
            }
        }
    }

    // A lane loads two elements for each of the tile's four chunks, all at once; the others get them from it.
    __device__ __forceinline__ void add_bias_of(const Tile& tile, float (&acc)[kTileN / 2]) const {
        constexpr int kChunks = kTileN / 64, kParts = kPartsOf<kLayout>, kChunksOfPart = kChunks / kParts;
        const int width = args.inner * kRatioOf<kLayout> / kParts;
        const T* of_expert = args.bias + static_cast<int64_t>(tile.expert) * (kParts * width);
        uint32_t bias[kChunks];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int n = (tile.i_n() * kChunksOfPart + c % kChunksOfPart) * 64 + 2 * lane;
            const T* at = of_expert + c / kChunksOfPart * width + n;
            bias[c] = n < width ? __ldg(reinterpret_cast<const uint32_t*>(at)) : 0;
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) add_bias<T>(acc + 32 * c, bias[c], lane);
    }

    __device__ __forceinline__ float activate(float gate, float up) const {
        return activated<kActivation>(gate, up, args.alpha, args.limit);
    }

    template <bool kOfPairs = false>
    __device__ __forceinline__ void send(const RowsOut& out, const float* values, int first, int rows, int part,
                                         int n) {
        unsigned char* chunk = staging + buffer * kChunkBytes;
        const uint32_t to = ptx::shared_address(chunk);
        buffer ^= 1;
        through_staging_of_warp<kBuffers - 1>(
            [&] {
                if constexpr (kOfPairs) {
                    write_chunk_of_pairs<T>(to, row, lane, values);
                } else {
                    write_chunk<T>(to, row, lane, values);
                }
            },
            [&] {
                send_rows<T>(lane, first + row, rows - row,
                             [&](auto send) { send(out, chunk + row * kRowBytes, part, n); });
            });
    }

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char*, Take, Give) {
        const int width = args.inner * kRatioOf<kLayout>;
        const RowsOut h{&args.h, args.h_data, width, width / kPartsOf<kLayout>};
        const RowsOut a{&args.a, args.a_data, args.inner, args.inner};
        if (args.bias != nullptr) add_bias_of(tile, acc);
#pragma unroll
        for (int c = 0; c < kColumns / 64; ++c) {
            const int n = tile.i_n() * kColumns + 64 * c;  // of A
            if (n >= args.inner) break;
            if constexpr (kLayout == Layout::kHalves) {
                float* gate = acc + 32 * c;
                float* up = acc + kTileN / 4 + 32 * c;
                if (args.h_data != nullptr) {
                    send(h, gate, first, rows, 0, n);
                    send(h, up, first, rows, 1, n);
                }
                if (args.a_data != nullptr) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) gate[i] = activate(gate[i], up[i]);
                    send(a, gate, first, rows, 0, n);
                }
            } else if constexpr (kLayout == Layout::kInTurn) {
                float* pairs = acc + 64 * c;
                if (args.h_data != nullptr) {
                    send(h, pairs, first, rows, 0, 2 * n);
                    if (2 * n + 64 < width) send(h, pairs + 32, first, rows, 0, 2 * n + 64);
                }
                if (args.a_data != nullptr) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) pairs[i] = activate(pairs[2 * i], pairs[2 * i + 1]);
                    send<true>(a, pairs, first, rows, 0, n);
                }
            } else {
                float* values = acc + 32 * c;
                if (args.h_data != nullptr) send(h, values, first, rows, 0, n);
                if (args.a_data != nullptr) {
#pragma unroll
                    for (int i = 0; i < 32; ++i) values[i] = activate(values[i], 1.0f);
                    send(a, values, first, rows, 0, n);
                }
            }
        }
    }
};

template <typename T, Activation kActivation, Layout kLayout>
void launch_gate_up(const GateUpArguments& a, const Plan& plan, const Launch& launch) {
    using Epilogue = GateUp<T, kActivation, kLayout>;
    constexpr int kParts = kPartsOf<kLayout>, kRatio = kRatioOf<kLayout>;
    VarlenM p = varlen_m(plan, a.inner, Epilogue::kColumns, a.reduced);
    p.rows = a.x;
    p.row_stride = a.x_stride;
    p.w = weights_map(a.w, plan.num_experts, a.across ? kTileK : kHalfN);
    // An output that nobody reads has no memory; its map is never used.
    typename Epilogue::Arguments args{};
    if (a.h != nullptr) args.h = rows_map(a.h, plan.num_rows, kParts, a.inner * kRatio / kParts, kWarpRows);
    if (a.a != nullptr) args.a = rows_map(a.a, plan.num_rows, 1, a.inner, kWarpRows);
    args.h_data = a.h;
    args.a_data = a.a;
    args.bias = static_cast<const T*>(a.bias);
    args.inner = static_cast<int>(a.inner);
    args.alpha = a.activation.alpha;
    args.limit = a.activation.limit;
    if (a.across) {
        launch_varlen_m<T, true, true, 4, Epilogue>(p, args, launch);
    } else {
        launch_varlen_m<T, true, false, 4, Epilogue>(p, args, launch);
    }
}

}  // namespace

void gate_up(const GateUpArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const Needs needs{"gate_up"};
    require_rows_plan(needs, plan);
    needs.present("slots", plan.slots);
    needs.multiple("inner", a.inner, 8);
    needs.multiple("reduced", a.reduced, kTileK);  // gathered without a mask
    needs.rows("x", a.x, a.x_stride, plan.num_rows / plan.top_k, sizeof(T));
    const int64_t width = is_gated(a.activation.activation) ? 2 * a.inner : a.inner;
    needs.weights(a.w, plan.num_experts, a.across ? a.reduced : width, a.across ? width : a.reduced);
    require(a.h != nullptr || a.a != nullptr, needs.op, ": h and a must not both be null");
    if (a.h != nullptr) needs.aligned("h", a.h);
    if (a.a != nullptr) needs.aligned("a", a.a);
    if (a.bias != nullptr) needs.aligned("bias", a.bias);
    with_activation(needs.op, a.activation, [&](auto activation, auto layout) {
        launch_gate_up<T, activation.value, layout.value>(a, plan, launch);
    });
}

}  // namespace moe_kernels
