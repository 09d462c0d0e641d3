// d_activation: dA' = dO[token(r)] . W_down[e], and in the epilogue A' = s A, dS = <dA', A>, dH = s dA' act'(H); see
// sm90/varlen_m.cuh for the kernel.
//
//     dO [T, D] · W_down [E, D, I], with H [R, 2I], s [T, K] -> dH [R, 2I] (may be H's memory), A' [R, I], dS [T, K]
//
// The epilogue goes through its 256 columns in chunks of 64. The gate and up chunks of H come through the same ring of
// stages as the operands of the product, so they are on their way while the products still run; dH is written over them
// in the stage, A' beside them, and both go out by the copy engine from there. Every element of H has one reader and
// one writer, one after the other. dS is a sum over all columns of I: each tile writes its partial sum by slot, and
// they are added in a fixed order afterwards.

#include "activation.cuh"
#include "d_activation.h"
#include "sm90/varlen_m.cuh"

namespace moe_kernels {
namespace {

constexpr int kChunks = kTileN / 64;

template <typename T>
struct DActivation : EpilogueDefaults {
    static constexpr const char* kName = "d_activation";
    static constexpr int kPartBytes = kTileM * kRowBytes;  // of gate, up and A' in a stage: 64 columns of all rows
    static constexpr int kSteps = kChunks, kStepBytes = 2 * kPartBytes;
    static constexpr int kStagingBytes = 0;

    struct Arguments {
        CUtensorMap h, dh, a;  // [R, 2, I], [R, 2, I], [R, 1, I]
        void *dh_data, *a_data;
        float* partial;
        const void* weights;
        DType weights_dtype;
        int inner;
    };

    const Arguments& args;
    const VarlenM& p;
    int consumer, thread, lane, row;
    int slot[2];         // of this thread's rows: lane / 4 and eight further
    uint32_t weight[2];  // their routing weights, as they lie in memory

    __device__ __forceinline__ DActivation(const Arguments& arguments, const VarlenM& params, unsigned char*, int c,
                                           int t)
        : args(arguments), p(params), consumer(c), thread(t), lane(t % kWarpSize), row(t / kWarpSize * 16) {}

    static __device__ __forceinline__ void load_step(const Arguments& args, unsigned char* to, uint64_t* barrier,
                                                     const Tile& tile, int c) {
        const int n = tile.i_n() * kTileN + 64 * c;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) {
                ptx::tma_load_3d(to + part * kPartBytes + i * kChunkBytes, &args.h, barrier, n, part,
                                 tile.first + i * kRows);
            }
        }
    }

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

    template <typename Take, typename Give>
    __device__ __forceinline__ void finish(const Tile& tile, int first, int rows, float (&acc)[kTileN / 2],
                                           unsigned char* stages, Take take, Give give_back) {
        const RowsOut dh{&args.dh, args.dh_data, 2 * args.inner, args.inner};
        const RowsOut a_out{&args.a, args.a_data, args.inner, args.inner};
        const float s[2] = {to_float(weight[0]), to_float(weight[1])};
        float d_s[2] = {0.0f, 0.0f};
        int before = 0;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const int stage = take();
            unsigned char* gate_chunk = stages + stage * kStageBytes + consumer * kChunkBytes;
            unsigned char* up_chunk = gate_chunk + kPartBytes;
            unsigned char* a_chunk = up_chunk + kPartBytes;
            const uint32_t gate_at = ptx::shared_address(gate_chunk), up_at = gate_at + kPartBytes;
            const uint32_t a_at = up_at + kPartBytes;
#pragma unroll
            for (int q = 0; q < 4; ++q) {  // 16 columns
                const uint32_t at = swizzled(row + (lane >> 3 & 1) * 8 + (lane & 7), 2 * q + (lane >> 4));
                uint32_t gate_words[4], up_words[4], a_words[4];
                ptx::ldmatrix_x4(gate_at + at, gate_words);
                ptx::ldmatrix_x4(up_at + at, up_words);
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // words 0, 2: upper rows; 1, 3: eight below
                    constexpr const T* kType = nullptr;
                    const float2 gate = to_float2(gate_words[i], kType), up = to_float2(up_words[i], kType);
                    const float* d_a = acc + 32 * c + 8 * q + 2 * i;
                    const float scale = s[i & 1];
                    float f0, df0, f1, df1;
                    silu_and_derivative(gate.x, f0, df0);
                    silu_and_derivative(gate.y, f1, df1);
                    const float a0 = f0 * up.x, a1 = f1 * up.y;
                    const float scaled0 = d_a[0] * scale, scaled1 = d_a[1] * scale;
                    d_s[i & 1] += d_a[0] * a0 + d_a[1] * a1;
                    gate_words[i] = from_floats(scaled0 * up.x * df0, scaled1 * up.y * df1, kType);
                    up_words[i] = from_floats(scaled0 * f0, scaled1 * f1, kType);
                    a_words[i] = from_floats(a0 * scale, a1 * scale, kType);
                }
                ptx::stmatrix_x4(gate_at + at, gate_words);
                ptx::stmatrix_x4(up_at + at, up_words);
                ptx::stmatrix_x4(a_at + at, a_words);
            }
            ptx::fence_async_proxy();
            warpgroup_sync(consumer);
            const int n = tile.i_n() * kTileN + 64 * c;
            if (n < args.inner) {
                send_chunk<T>(dh, gate_chunk, thread, first, rows, 0, n);
                send_chunk<T>(dh, up_chunk, thread, first, rows, 1, n);
                send_chunk<T>(a_out, a_chunk, thread, first, rows, 0, n);
            }
            if (thread == 0) {
                ptx::bulk_commit();
                ptx::bulk_wait_read<1>();  // the chunk before this one is out
                if (c > 0) give_back(before);
            }
            before = stage;
        }
        if (rows < kRows) warpgroup_sync(consumer);  // all threads have sent their part of the last chunk
        if (thread == 0) {
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

}  // namespace

void d_activation(const DActivationArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const Needs needs{DActivation<T>::kName};
    require_rows_plan(needs, plan);
    needs.present("slots", plan.slots);
    needs.multiple("inner", a.inner, 8);
    needs.multiple("reduced", a.reduced, kTileK);  // gathered without a mask
    needs.rows("d_out", a.d_out, a.d_out_stride, plan.num_rows / plan.top_k, sizeof(T));
    needs.weights(a.w, plan.num_experts, a.reduced, a.inner);
    needs.aligned("h", a.h);
    needs.aligned("dh", a.dh);
    needs.aligned("a", a.a);
    needs.present("partial", a.partial);
    needs.present("weights", a.weights);
    require(a.weights_dtype != DType::kNone, needs.op, ": weights_dtype must be float32, bfloat16 or float16");

    VarlenM p = varlen_m(plan, a.inner, kTileN, a.reduced);
    p.rows = a.d_out;
    p.row_stride = a.d_out_stride;
    p.w = weights_map(a.w, plan.num_experts, kTileK);
    const DActivation<T>::Arguments args{rows_map(a.h, plan.num_rows, 2, a.inner),
                                         rows_map(a.dh, plan.num_rows, 2, a.inner),
                                         rows_map(a.a, plan.num_rows, 1, a.inner),
                                         a.dh,
                                         a.a,
                                         a.partial,
                                         a.weights,
                                         a.weights_dtype,
                                         static_cast<int>(a.inner)};
    launch_varlen_m<T, true, true, 4, DActivation<T>>(p, args, launch);
}

}  // namespace moe_kernels
