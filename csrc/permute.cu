// permute: every token's row to its K places in expert order, scaled by the routing weights where there are any.
//
//     out[positions[t, k], :] = weights[t, k] * x[t, :]        x [T, D], out [R, D], R = T * K
//     out[r, :] = 0                                            r >= offsets[E], the rows of dropped slots
//
// Memory-bound: T rows are read once and R rows written. The tokens are what is shared out, not the rows of the result:
// in expert order the copies of a token lie far apart, and each of them would read x from memory again once x no longer
// fits in L2. A thread owns 16 bytes of one token's row, reads them once and writes them K times; a block is 256
// threads over as many tokens as it takes.
//
// Positions reach every row below offsets[E] once. The rows past it belong to no slot in particular, so token t also
// has rows t * K to t * K + K - 1 to clear, as far as they are among them. No two threads share an output.

#include "common.cuh"
#include "permute.h"
#include "routing_weight.cuh"
#include "token_rows.cuh"

namespace moe_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;  // rows in flight where K is not one of the compiled values

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

// kTopK 0 takes any K, kGroup rows at a time.
template <typename T, int kTopK>
__global__ void __launch_bounds__(kThreads) permute_kernel(const PermuteArguments a) {
    constexpr int kWidth = Vector<T>::kWidth;
    constexpr int kRows = kTopK > 0 ? kTopK : kGroup;
    const int top_k = kTopK > 0 ? kTopK : a.top_k;

    const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t column = static_cast<int64_t>(blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
    if (t >= a.tokens || column >= a.width) return;

    const T* x = static_cast<const T*>(a.x) + t * a.x_stride + column;
    T* out = static_cast<T*>(a.out) + column;
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(x));
    const int64_t kept = a.offsets[a.num_experts];
    for (int k = 0; k < top_k; k += kRows) {
        int position[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            position[i] = kTopK > 0 || k + i < top_k ? a.positions[t * top_k + k + i] : -1;
        }

        float weight[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            weight[i] = position[i] >= 0 ? load_weight(a.weights, a.weights_dtype, t * top_k + k + i) : 0.0f;
        }

#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (position[i] < 0) continue;
            uint4 scaled = bits;
            if (a.weights != nullptr) {
                float value[kWidth];
                unpack(bits, value, x);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) value[j] *= weight[i];
                scaled = pack(value, x);
            }
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(position[i]) * a.width) = scaled;
        }
    }

    for (int64_t row = max(t * top_k, kept); row < (t + 1) * top_k; ++row) {
        *reinterpret_cast<uint4*>(out + row * a.width) = make_uint4(0, 0, 0, 0);
    }
}

}  // namespace

void permute(const PermuteArguments& a, cudaStream_t stream) {
    if (a.tokens == 0 || a.width == 0 || a.top_k == 0) return;
    const Needs needs{"permute"};
    const int element_bytes = a.dtype == DType::kFloat32 ? 4 : 2;
    needs.multiple("width", a.width, 8);
    require(a.top_k > 0, "permute: top_k must not be negative, got ", a.top_k);
    require(a.num_experts > 0, "permute: num_experts must be positive, got ", a.num_experts);
    needs.aligned("out", a.out);
    needs.rows("x", a.x, a.x_stride, a.tokens, element_bytes);
    needs.present("offsets", a.offsets);
    needs.present("positions", a.positions);
    require_weights(needs, a.weights, a.weights_dtype);
    launch_token_rows<kThreads>("permute", a, [&](auto element, auto top_k, dim3 grid, dim3 block) {
        permute_kernel<decltype(element), decltype(top_k)::value><<<grid, block, 0, stream>>>(a);
        check_launch("permute_kernel");
    });
}

}  // namespace moe_kernels
