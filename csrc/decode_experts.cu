// decode_experts: the experts' forward for few tokens, straight from the expert indices.
//
//     A[r] = act(x[token(r)] . W_gate_up[e]^T (+ bias))       r = t * K + k, e = indices[r]        A [R, I]
//     Y[r] = A[r] . W_down[e]^T (+ bias)                                                           Y [R, D]
//     out[t] = sum over k of weights[t, k] * Y[t * K + k]     float32, k ascending                 out [T, D]
//
// With a few rows an expert the weights are all the work: each is read once and used for at most 24 rows, far below
// what the memory allows for arithmetic. So nothing is sorted, staged or copied: a block finds the rows of its expert
// by looking through the R indices, and its four warps stream 32 rows of W from memory into tensor-core operands in
// registers, 16 bytes a load. A row of W is an operand row (m16n8k16: W is the 16 wide side, the expert's rows the 8
// wide one); the warps take 64 columns of it in turn, 512 bytes a step. A sum does not care about the order of its
// columns, so a lane's 16 bytes are used as the four column pairs that the instruction expects from it, on both sides
// alike. The warps' partial sums meet in shared memory, in a fixed order.
//
// Three launches, no plan, nothing the host must know but shapes. An expert that gets many rows reads its weights once
// for every 24, from L2. Idea of weights on the wide side for few tokens: "swap A and B" of FasterTransformer's and
// TensorRT-LLM's low-latency kernels.

#include <algorithm>

#include "activation.cuh"
#include "common.cuh"
#include "decode_experts.h"
#include "ptx/mma.cuh"
#include "require.h"
#include "routing_weight.cuh"

namespace moe_kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSets = 2;         // operands of 16 weight rows in one pass: gate and up rows, or neighbours
constexpr int kSetRows = 16;     // of m16n8k16
constexpr int kGroupTokens = 8;  // of m16n8k16
constexpr int kMostGroups = 3;
constexpr int kPassTokens = kMostGroups * kGroupTokens;
constexpr int kSpan = 64;  // columns a warp takes at a time: two loads of a lane, 128 bytes of a row

__device__ __forceinline__ int64_t expert_of(const DecodeArguments& a, int row) {
    return a.index_bytes == 8 ? static_cast<const int64_t*>(a.indices)[row] : static_cast<const int*>(a.indices)[row];
}

// The rows of the block's expert, in any order: each row's arithmetic is its own. With fewer rows than experts a block
// belongs to a row, and the first row of an expert stands for all; -1 for the others.
struct Rows {
    int16_t of_expert[kMostDecodeRows];
    int count;
    bool is_repeat;
};

__device__ __forceinline__ int64_t find_rows(const DecodeArguments& a, Rows& rows) {
    const int num_rows = a.tokens * a.top_k;
    const int place = blockIdx.y;
    const bool by_row = num_rows < a.num_experts;
    const int64_t expert = by_row ? expert_of(a, place) : place;
    if (expert < 0 || expert >= a.num_experts) return -1;
    if (threadIdx.x == 0) {
        rows.count = 0;
        rows.is_repeat = false;
    }
    __syncthreads();
#pragma unroll 4
    for (int row = threadIdx.x; row < num_rows; row += kThreads) {
        if (expert_of(a, row) == expert) {
            if (by_row && row < place) rows.is_repeat = true;
            rows.of_expert[atomicAdd(&rows.count, 1)] = static_cast<int16_t>(row);
        }
    }
    __syncthreads();
    return rows.is_repeat || rows.count == 0 ? -1 : expert;
}

// ---------------------------------------------------------------------------------------------------------------------
// The product

// Sums[warp][set][weight row][token]
using Partial = float[kWarps][kSets][kSetRows][kPassTokens + 1];

__device__ __forceinline__ uint4 load_or_zero(const void* pointer, bool inside) {
    return inside ? __ldg(static_cast<const uint4*>(pointer)) : make_uint4(0, 0, 0, 0);
}

// Weights pass through: no kernel finds them in L1 again.
__device__ __forceinline__ uint4 stream_or_zero(const void* pointer, bool inside) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (inside) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                     : "l"(pointer));
    }
    return bits;
}

template <typename T>
struct Span {
    uint4 w[kSets][2][2];  // [set][row g or g + 8][which half of the span]

    __device__ __forceinline__ void load(const T* const (&rows)[kSets][2], int column, int width) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int c = column + half * (kSpan / 2);
#pragma unroll
            for (int set = 0; set < kSets; ++set) {
                w[set][0][half] = stream_or_zero(rows[set][0] + c, c < width);
                w[set][1][half] = stream_or_zero(rows[set][1] + c, c < width);
            }
        }
    }
};

// This warp's part of kSets * 16 weight rows times kGroups * 8 tokens. ``w`` points at the lane's rows; its token in
// each group begins ``tokens`` elements into ``x``.
template <typename T, int kGroups>
__device__ __forceinline__ void product(const T* const (&w)[kSets][2], const T* x, const int (&tokens)[kGroups],
                                        int width, float (&sums)[kSets][kGroups][4]) {
    const int warp = threadIdx.x / kWarpSize, t = threadIdx.x % 4;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[set][group][i] = 0;
        }
    }
    constexpr int kStep = kWarps * kSpan;
    int column = warp * kSpan + t * 8;
    Span<T> next;
    next.load(w, column, width);
    for (; column - t * 8 < width; column += kStep) {
        const Span<T> span = next;
        next.load(w, column + kStep, width);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int c = column + half * (kSpan / 2);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const uint4 b = load_or_zero(x + (tokens[group] + c), c < width);
#pragma unroll
                for (int set = 0; set < kSets; ++set) {
                    const uint4 lower = span.w[set][0][half], upper = span.w[set][1][half];
                    ptx::mma_16x8x16(sums[set][group], lower.x, upper.x, lower.y, upper.y, b.x, b.y, w[0][0]);
                    ptx::mma_16x8x16(sums[set][group], lower.z, upper.z, lower.w, upper.w, b.z, b.w, w[0][0]);
                }
            }
        }
    }
}

template <int kGroups>
__device__ __forceinline__ void keep(const float (&sums)[kSets][kGroups][4], Partial& partial) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                partial[warp][set][g + i / 2 * 8][group * kGroupTokens + 2 * t + i % 2] = sums[set][group][i];
            }
        }
    }
}

__device__ __forceinline__ float total(const Partial& partial, int set, int row, int token) {
    float sum = partial[0][set][row][token];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += partial[warp][set][row][token];
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// What the two products are: which weight rows a set holds, where a routed row's values are, what becomes of a sum

__device__ __forceinline__ float activate(float gate, float up, const DecodeArguments& a) {
    using A = Activation;
    switch (a.activation) {
        case A::kSwiGLU: return activated<A::kSwiGLU>(gate, up, a.alpha, a.limit);
        case A::kGeGLU: return activated<A::kGeGLU>(gate, up, a.alpha, a.limit);
        case A::kGeGLUTanh: return activated<A::kGeGLUTanh>(gate, up, a.alpha, a.limit);
        case A::kSwiGLUOAI: return activated<A::kSwiGLUOAI>(gate, up, a.alpha, a.limit);
        case A::kSwiGLUClampBefore: return activated<A::kSwiGLUClampBefore>(gate, up, a.alpha, a.limit);
        case A::kSwiGLUClampAfter: return activated<A::kSwiGLUClampAfter>(gate, up, a.alpha, a.limit);
        case A::kSiLU: return activated<A::kSiLU>(gate, up, a.alpha, a.limit);
        case A::kGELU: return activated<A::kGELU>(gate, up, a.alpha, a.limit);
        case A::kGELUTanh: return activated<A::kGELUTanh>(gate, up, a.alpha, a.limit);
        default: return activated<A::kReLU2>(gate, up, a.alpha, a.limit);
    }
}

template <typename T, bool kGated>
struct GateUp {
    static constexpr int kColumns = kGated ? kSetRows : kSets * kSetRows;  // of A, made at a time

    static __device__ __forceinline__ const Weights& weights(const DecodeArguments& a) { return a.gate_up; }
    static __device__ __forceinline__ int width(const DecodeArguments& a) { return a.hidden; }
    static __device__ __forceinline__ int columns(const DecodeArguments& a) { return a.inner; }

    static __device__ __forceinline__ int64_t weight_row(const DecodeArguments& a, int set, int first, int row) {
        if (!kGated) return min(first + set * kSetRows + row, a.inner - 1);
        return gated_row(a, min(first + row, a.inner - 1), set);
    }

    // Where the gate (part 0) and up (part 1) of a column of A are.
    static __device__ __forceinline__ int gated_row(const DecodeArguments& a, int column, int part) {
        return a.interleaved ? 2 * column + part : column + part * a.inner;
    }

    static __device__ __forceinline__ const T* input(const DecodeArguments& a) { return static_cast<const T*>(a.x); }
    static __device__ __forceinline__ int input_row(const DecodeArguments& a, int row) { return row / a.top_k; }

    static __device__ __forceinline__ void store(const DecodeArguments& a, const Partial& partial, int64_t expert,
                                                 int row, int token, int first, int column) {
        const T* bias = static_cast<const T*>(a.bias_gate_up) + expert * a.gate_up.rows;
        const bool has_bias = a.bias_gate_up != nullptr;
        float gate, up = 1;
        if constexpr (kGated) {
            const int at_gate = gated_row(a, first + column, 0), at_up = gated_row(a, first + column, 1);
            gate = total(partial, 0, column, token) + (has_bias ? static_cast<float>(bias[at_gate]) : 0);
            up = total(partial, 1, column, token) + (has_bias ? static_cast<float>(bias[at_up]) : 0);
        } else {
            gate = total(partial, column / kSetRows, column % kSetRows, token);
            gate += has_bias ? static_cast<float>(bias[first + column]) : 0;
        }
        const float value = activate(gate, up, a);
        static_cast<T*>(a.a)[static_cast<int64_t>(row) * a.inner + first + column] = static_cast<T>(value);
    }
};

template <typename T>
struct Down {
    static constexpr int kColumns = kSets * kSetRows;  // of Y

    static __device__ __forceinline__ const Weights& weights(const DecodeArguments& a) { return a.down; }
    static __device__ __forceinline__ int width(const DecodeArguments& a) { return a.inner; }
    static __device__ __forceinline__ int columns(const DecodeArguments& a) { return a.hidden; }

    static __device__ __forceinline__ int64_t weight_row(const DecodeArguments& a, int set, int first, int row) {
        return min(first + set * kSetRows + row, a.hidden - 1);
    }

    static __device__ __forceinline__ const T* input(const DecodeArguments& a) { return static_cast<const T*>(a.a); }
    static __device__ __forceinline__ int input_row(const DecodeArguments&, int row) { return row; }

    static __device__ __forceinline__ void store(const DecodeArguments& a, const Partial& partial, int64_t expert,
                                                 int row, int token, int first, int column) {
        float value = total(partial, column / kSetRows, column % kSetRows, token);
        if (a.bias_down != nullptr) {
            value += static_cast<float>(static_cast<const T*>(a.bias_down)[expert * a.hidden + first + column]);
        }
        static_cast<T*>(a.y)[static_cast<int64_t>(row) * a.hidden + first + column] = static_cast<T>(value);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

template <typename T, typename Product, int kGroups>
__device__ __forceinline__ void pass(const DecodeArguments& a, const Rows& rows, Partial& partial, int64_t expert,
                                     int first_row, int first_column) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4;
    const Weights& weights = Product::weights(a);
    const T* w[kSets][2];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            w[set][i] = static_cast<const T*>(weights.data) + expert * weights.expert_stride +
                        Product::weight_row(a, set, first_column, g + 8 * i) * weights.row_stride;
        }
    }
    const int width = Product::width(a);
    int tokens[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {  // past the expert's rows: its last, and nobody reads the sums
        const int row = rows.of_expert[min(first_row + group * kGroupTokens + g, rows.count - 1)];
        tokens[group] = Product::input_row(a, row) * width;
    }
    float sums[kSets][kGroups][4];
    product<T, kGroups>(w, Product::input(a), tokens, width, sums);
    keep<kGroups>(sums, partial);
    __syncthreads();
    const int num_tokens = min(rows.count - first_row, kGroups * kGroupTokens);
    const int columns = min(Product::columns(a) - first_column, Product::kColumns);
    for (int i = threadIdx.x; i < num_tokens * Product::kColumns; i += kThreads) {
        const int token = i / Product::kColumns, column = i % Product::kColumns;
        if (column < columns) {
            Product::store(a, partial, expert, rows.of_expert[first_row + token], token, first_column, column);
        }
    }
    __syncthreads();
}

// Grid: x over ``columns`` columns of the result at a time, y over experts, or over rows where those are fewer.
template <typename T, typename Product>
__global__ void __launch_bounds__(kThreads, 3)
    decode_product_kernel(const __grid_constant__ DecodeArguments a, int columns) {
    __shared__ Rows rows;
    __shared__ Partial partial;
    const int64_t expert = find_rows(a, rows);
    if (expert < 0) return;
    const int first = blockIdx.x * columns, end = min(first + columns, Product::columns(a));
    for (int column = first; column < end; column += Product::kColumns) {
        for (int row = 0; row < rows.count; row += kPassTokens) {
            const int left = rows.count - row;
            if (left <= kGroupTokens) {
                pass<T, Product, 1>(a, rows, partial, expert, row, column);
            } else if (left <= 2 * kGroupTokens) {
                pass<T, Product, 2>(a, rows, partial, expert, row, column);
            } else {
                pass<T, Product, kMostGroups>(a, rows, partial, expert, row, column);
            }
        }
    }
}

// A thread sums 8 columns of one token.
template <typename T>
__global__ void __launch_bounds__(kThreads) decode_sum_kernel(const __grid_constant__ DecodeArguments a) {
    constexpr int kWidth = Vector<T>::kWidth;
    const int t = blockIdx.y;
    const int column = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
    if (column >= a.hidden) return;
    const T* y = static_cast<const T*>(a.y) + column;
    float sum[kWidth] = {};
#pragma unroll 8
    for (int row = t * a.top_k; row < (t + 1) * a.top_k; ++row) {
        const int64_t expert = expert_of(a, row);
        if (expert < 0 || expert >= a.num_experts) continue;  // its Y was never written
        float value[kWidth];
        unpack(*reinterpret_cast<const uint4*>(y + static_cast<int64_t>(row) * a.hidden), value, y);
        const float weight = load_weight(a.routing_weights, a.routing_weights_dtype, row);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(weight, value[i], sum[i]);
    }
    T* out = static_cast<T*>(a.out) + static_cast<int64_t>(t) * a.hidden + column;
    *reinterpret_cast<uint4*>(out) = pack(sum, y);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Long blocks spend less of their time on finding rows, many blocks fill the GPU: as long as still leaves it several
// for every multiprocessor.
template <typename T, typename Product>
void launch_product(const DecodeArguments& a, int columns, int num_sms, cudaStream_t stream) {
    constexpr int kBlocksPerSM = 6, kMostSteps = 4;
    const int places = std::min(a.tokens * a.top_k, a.num_experts);
    const int64_t steps = ceil_div(columns, Product::kColumns);
    const int64_t each = std::clamp<int64_t>(steps * places / (kBlocksPerSM * num_sms), 1, kMostSteps);
    const dim3 grid(static_cast<unsigned>(ceil_div(steps, each)), places);
    decode_product_kernel<T, Product><<<grid, kThreads, 0, stream>>>(a, static_cast<int>(each) * Product::kColumns);
    check_launch("decode_product_kernel");
}

template <typename T>
void launch(const DecodeArguments& a, int num_sms, cudaStream_t stream) {
    if (is_gated(a.activation)) {
        launch_product<T, GateUp<T, true>>(a, a.inner, num_sms, stream);
    } else {
        launch_product<T, GateUp<T, false>>(a, a.inner, num_sms, stream);
    }
    launch_product<T, Down<T>>(a, a.hidden, num_sms, stream);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.hidden, kThreads * Vector<T>::kWidth)), a.tokens);
    decode_sum_kernel<T><<<grid, kThreads, 0, stream>>>(a);
    check_launch("decode_sum_kernel");
}

}  // namespace

void decode_experts(const DecodeArguments& a, int num_sms, cudaStream_t stream) {
    if (a.tokens == 0) return;
    const Needs needs{"decode_experts"};
    require(a.top_k > 0 && a.tokens <= kMostDecodeRows / a.top_k, "decode_experts: tokens * top_k must be in 1..",
            kMostDecodeRows, ", got ", a.tokens, " * ", a.top_k);
    needs.multiple("hidden", a.hidden, 8);
    needs.multiple("inner", a.inner, 8);
    require(a.num_experts >= 1, "decode_experts: num_experts must be positive, got ", a.num_experts);
    require(num_sms >= 1, "decode_experts: num_sms must be positive, got ", num_sms);
    needs.aligned("x", a.x);
    needs.aligned("a", a.a);
    needs.aligned("y", a.y);
    needs.aligned("out", a.out);
    require(a.activation >= Activation::kSwiGLU && a.activation <= Activation::kReLU2, "decode_experts: no activation ",
            static_cast<int>(a.activation));
    needs.weights(a.gate_up, a.num_experts, is_gated(a.activation) ? 2 * a.inner : a.inner, a.hidden);
    needs.weights(a.down, a.num_experts, a.hidden, a.inner);
    needs.present("indices", a.indices);
    needs.present("routing_weights", a.routing_weights);
    needs.dtype("routing_weights_dtype", a.routing_weights_dtype);
    require(!a.interleaved || is_gated(a.activation), "decode_experts: interleaved needs a gated activation");
    require(a.index_bytes == 4 || a.index_bytes == 8, "decode_experts: index_bytes must be 4 or 8, got ",
            a.index_bytes);
    switch (a.dtype) {
        case DType::kBFloat16: return launch<__nv_bfloat16>(a, num_sms, stream);
        case DType::kFloat16: return launch<__half>(a, num_sms, stream);
        default: require(false, "decode_experts: dtype must be bfloat16 or float16");
    }
}

}  // namespace moe_kernels
