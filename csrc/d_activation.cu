// d_activation: dA' = dO[token(r)] . W_down[e], and in the epilogue A' = s A, dS = <dA', A>, dH = s dA' act'(H); see
// sm90/varlen_m.cuh for the kernel.
//
//     dO [T, D] · W_down [E, D, I] (across) or [E, I, D] (along), with H [R, N], s [T, K]
//     -> dH [R, N] (may be H's memory), A' [R, I], dS [T, K];  N = 2I with a gate, else I
//
// The epilogue goes through its 256 columns in chunks of 64. The chunks of H that belong to them come through the same
// ring of stages as the operands of the product, so they are on their way while the products still run; dH is written
// over them in the stage, A' beside them, and both go out by the copy engine from there. Every element of H has one
// reader that uses it and one writer, one after the other; a tile at an expert's end also loads rows of the next one,
// which may be H or dH by then, and makes nothing of them. dS is a sum over all columns of I: each tile writes its
// partial sum by slot, and they are added in a fixed order afterwards.
//
// Chunks of H: one of gate and one of up columns (halves), two neighbours (in turn), or one (plain). Where gate and up
// come in turn, those of a thread's two columns of dA' are eight bytes of H, which it reads and writes by itself.
// Each layout, activation and storage of W is a kernel of its own; alpha and limit are run-time arguments.

#include "activation.cuh"
#include "d_activation.h"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

constexpr int kChunks = kTileN / 64;

template <typename T, Activation kActivation, Layout kLayout>
struct DActivation : EpilogueDefaults {
    static constexpr const char* kName = "d_activation";
    static constexpr int kPartBytes = kTileM * kRowBytes;  // 64 columns of all rows, of H and of A', in a stage
    static constexpr int kHParts = kRatioOf<kLayout>;      // first those of H, then A'
    static constexpr int kSteps = kChunks, kStepBytes = kHParts * kPartBytes;
    static_assert(kStepBytes + kPartBytes <= kStageBytes);
    static constexpr int kStagingBytes = 0;

    struct Arguments {
        CUtensorMap h, dh, a;  // [R, parts, N / parts] twice, [R, 1, I]
        void *dh_data, *a_data;
        float* partial;
        const void* weights;
        DType weights_dtype;
        int inner;
        float alpha, limit;
    };

    const Arguments& args;
    const VarlenM& p;
    int consumer, lane, row;  // the warp's first
    int slot[2];              // of this thread's rows: lane / 4 and eight further
    uint32_t weight[2];       // their routing weights, as they lie in memory

    __device__ __forceinline__ DActivation(const Arguments& arguments, const VarlenM& params, unsigned char*, int c,
                                           int t)
        : args(arguments), p(params), consumer(c), lane(t % kWarpSize), row(t / kWarpSize * kWarpRows) {}

    static __device__ __forceinline__ void load_step(const Arguments& args, unsigned char* to, uint64_t* barrier,
                                                     const Tile& tile, int c) {
        const int n = tile.i_n() * kTileN + 64 * c;
#pragma unroll
        for (int part = 0; part < kHParts; ++part) {
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) {
                ptx::tma_load_3d(to + part * kPartBytes + i * kChunkBytes, &args.h, barrier, column_of_h(n, part),
                                 part_of_h(part), tile.first + i * kRows);
            }
        }
    }

    // Where chunk `part` of H is that belongs to the columns of A from n on.
    static __device__ __forceinline__ int column_of_h(int n, int part) {
        return kLayout == Layout::kInTurn ? 2 * n + 64 * part : n;
    }
    static __device__ __forceinline__ int part_of_h(int part) { return kLayout == Layout::kHalves ? part : 0; }

    __device__ __forceinline__ void begin(int first, int rows) {
#pragma unroll
        for (int i = 0; i < 2; ++i) slot[i] = __ldg(p.slots + first + min(row + lane / 4 + 8 * i, rows - 1));
    }

    // Some steps later, when the slots have arrived. The bits stay as they are: a conversion would wait for them.
    __device__ __forceinline__ void look_ahead() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (args.weights_dtype == DType::kFloat32) {
                weight[i] = __ldg(static_cast<const uint32_t*>(args.weights) + slot[i]);
            } else {
                weight[i] = __ldg(static_cast<const uint16_t*>(args.weights) + slot[i]);
            }
        }
    }

    __device__ __forceinline__ float to_float(uint32_t bits) const {
        switch (args.weights_dtype) {
            case DType::kFloat32: return __uint_as_float(bits);
            case DType::kBFloat16: return __uint_as_float(bits << 16);
            default: return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
        }
    }

    // One row's pair of columns: from dA', gate and up to dH, A' (packed) and the row's part of dS.
    struct Pair {
        uint32_t a;
        Gradients low, high;  // d_gate and d_up, scaled
    };
    __device__ __forceinline__ Pair backward(const float* d_a, float2 gate, float2 up, float scale, float& d_s) const {
        Pair out;
        out.low = gradients<kActivation>(gate.x, up.x, args.alpha, args.limit);
        out.high = gradients<kActivation>(gate.y, up.y, args.alpha, args.limit);
        const float scaled0 = d_a[0] * scale, scaled1 = d_a[1] * scale;
        d_s += d_a[0] * out.low.a + d_a[1] * out.high.a;
        out.low.gate *= scaled0;
        out.low.up *= scaled0;
        out.high.gate *= scaled1;
        out.high.up *= scaled1;
        out.a = packed(out.low.a * scale, out.high.a * scale);
        return out;
    }

    static __device__ __forceinline__ float2 unpacked(uint32_t word) {
        return to_float2(word, static_cast<const T*>(nullptr));
    }
    static __device__ __forceinline__ uint32_t packed(float low, float high) {
        return from_floats(low, high, static_cast<const T*>(nullptr));
    }

    // 64 columns of dA' in a consumer's chunks of H: dH over them, A' beside them.
    __device__ __forceinline__ void backward_chunk(unsigned char* h_chunk, const float* acc, const float (&s)[2],
                                                   float (&d_s)[2]) const {
        const uint32_t h_at = ptx::shared_address(h_chunk), a_at = h_at + kHParts * kPartBytes;
        const uint32_t own = swizzled(row + lane / 4, lane >> 1 & 1) + (lane & 1) * sizeof(uint2);
        auto at_of = [&](int q) { return swizzled(row + (lane >> 3 & 1) * 8 + (lane & 7), 2 * q + (lane >> 4)); };
        uint32_t ahead[2][4];  // of gate and up, sixteen columns on
        auto load = [&](int q) {
            if constexpr (kLayout != Layout::kInTurn) ptx::ldmatrix_x4(h_at + at_of(q), ahead[0]);
            if constexpr (kLayout == Layout::kHalves) ptx::ldmatrix_x4(h_at + kPartBytes + at_of(q), ahead[1]);
        };
        load(0);
#pragma unroll
        for (int q = 0; q < 4; ++q) {  // 16 columns
            const uint32_t at = at_of(q);
            uint32_t h_words[4], up_words[4], a_words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                h_words[i] = ahead[0][i];
                up_words[i] = ahead[1][i];
            }
            if (q < 3) load(q + 1);
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // words 0, 2: upper rows; 1, 3: eight below
                const float* d_a = acc + 8 * q + 2 * i;
                const float scale = s[i & 1];
                if constexpr (kLayout == Layout::kInTurn) {
                    // Eight columns of A' are 16 of H: two 16-byte pieces, of which a lane of the quad has half a one.
                    const int eight = 2 * q + i / 2, at_pair = own ^ (eight % 4 * 2 << 4);
                    uint2& words =
                        *reinterpret_cast<uint2*>(h_chunk + eight / 4 * kPartBytes + (i & 1) * 8 * kRowBytes + at_pair);
                    const float2 first = unpacked(words.x), second = unpacked(words.y);  // gate, up
                    const Pair pair = backward(d_a, make_float2(first.x, second.x), make_float2(first.y, second.y),
                                               scale, d_s[i & 1]);
                    words = make_uint2(packed(pair.low.gate, pair.low.up), packed(pair.high.gate, pair.high.up));
                    a_words[i] = pair.a;
                } else {
                    const float2 up = kLayout == Layout::kHalves ? unpacked(up_words[i]) : float2{};
                    const Pair pair = backward(d_a, unpacked(h_words[i]), up, scale, d_s[i & 1]);
                    h_words[i] = packed(pair.low.gate, pair.high.gate);
                    up_words[i] = packed(pair.low.up, pair.high.up);
                    a_words[i] = pair.a;
                }
            }
            if constexpr (kLayout != Layout::kInTurn) ptx::stmatrix_x4(h_at + at, h_words);
            if constexpr (kLayout == Layout::kHalves) ptx::stmatrix_x4(h_at + kPartBytes + at, up_words);
            ptx::stmatrix_x4(a_at + at, a_words);
        }
    }

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char* stages, Take take, Give give_back) {
        const int width = args.inner * kRatioOf<kLayout>;
        const RowsOut dh{&args.dh, args.dh_data, width, width / kPartsOf<kLayout>};
        const RowsOut a_out{&args.a, args.a_data, args.inner, args.inner};
        const float s[2] = {to_float(weight[0]), to_float(weight[1])};
        float d_s[2] = {0.0f, 0.0f};
        int before = 0;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int stage = take();
            unsigned char* h_chunk = stages + stage * kStageBytes + consumer * kChunkBytes;
            backward_chunk(h_chunk, acc + 32 * c, s, d_s);
            ptx::fence_async_proxy();
            __syncwarp();
            const int n = tile.i_n() * kTileN + 64 * c;
            const unsigned char* own = h_chunk + row * kRowBytes;  // the warp's rows
            if (n < args.inner) {
                send_rows<T>(lane, first + row, rows - row, [&](auto send) {
#pragma unroll
                    for (int part = 0; part < kHParts; ++part) {
                        const int column = column_of_h(n, part);
                        if (column < dh.width) send(dh, own + part * kPartBytes, part_of_h(part), column);
                    }
                    send(a_out, own + kHParts * kPartBytes, 0, n);
                });
            }
            if (ptx::elect()) {
                ptx::bulk_commit();
                ptx::bulk_wait_read<1>();  // the chunk before this one is out
                if (c > 0) give_back(before);
            }
            before = stage;
        }
        __syncwarp();  // all lanes have sent their part of the last chunk
        if (ptx::elect()) {
            ptx::bulk_wait_read<0>();
            give_back(before);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // the four lanes of a quad hold a row's columns
            d_s[i] += __shfl_xor_sync(kFullWarp, d_s[i], 1);
            d_s[i] += __shfl_xor_sync(kFullWarp, d_s[i], 2);
            if (lane % 4 == 0 && row + lane / 4 + 8 * i < rows) {
                args.partial[static_cast<int64_t>(tile.i_n()) * p.num_rows + slot[i]] = d_s[i];
            }
        }
    }
};

template <typename T, Activation kActivation, Layout kLayout>
void launch_d_activation(const DActivationArguments& a, const Plan& plan, const Launch& launch) {
    using Epilogue = DActivation<T, kActivation, kLayout>;
    constexpr int kParts = kPartsOf<kLayout>, kRatio = kRatioOf<kLayout>;
    VarlenM p = varlen_m(plan, a.inner, kTileN, a.reduced);
    p.rows = a.d_out;
    p.row_stride = a.d_out_stride;
    p.w = weights_map(a.w, plan.num_experts, a.along ? kHalfN : kTileK);
    const typename Epilogue::Arguments args{rows_map(a.h, plan.num_rows, kParts, a.inner * kRatio / kParts, kRows),
                                            rows_map(a.dh, plan.num_rows, kParts, a.inner * kRatio / kParts, kWarpRows),
                                            rows_map(a.a, plan.num_rows, 1, a.inner, kWarpRows),
                                            a.dh,
                                            a.a,
                                            a.partial,
                                            a.weights,
                                            a.weights_dtype,
                                            static_cast<int>(a.inner),
                                            a.activation.alpha,
                                            a.activation.limit};
    if (a.along) {
        launch_varlen_m<T, true, false, 4, Epilogue>(p, args, launch);
    } else {
        launch_varlen_m<T, true, true, 4, Epilogue>(p, args, launch);
    }
}

}  // namespace

void d_activation(const DActivationArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const Needs needs{"d_activation"};
    require_rows_plan(needs, plan);
    needs.present("slots", plan.slots);
    needs.multiple("inner", a.inner, 8);
    needs.multiple("reduced", a.reduced, kTileK);  // gathered without a mask
    needs.rows("d_out", a.d_out, a.d_out_stride, plan.num_rows / plan.top_k, sizeof(T));
    needs.weights(a.w, plan.num_experts, a.along ? a.inner : a.reduced, a.along ? a.reduced : a.inner);
    needs.aligned("h", a.h);
    needs.aligned("dh", a.dh);
    needs.aligned("a", a.a);
    needs.present("partial", a.partial);
    needs.present("weights", a.weights);
    needs.dtype("weights_dtype", a.weights_dtype);
    with_activation(needs.op, a.activation, [&](auto activation, auto layout) {
        launch_d_activation<T, activation.value, layout.value>(a, plan, launch);
    });
}

}  // namespace moe_kernels
