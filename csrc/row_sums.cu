// row_sums: the sum of the rows of every expert, a bias's gradient.
//
//     sums[e, :] = sum over the rows r of expert e of rows(r)        rows [R, M], or [T, M] gathered by token
//
// Memory-bound: the rows are read once. Experts may own any number of them, so blocks share out the rows, not the
// experts: a block takes 256 columns of a chunk of 256 rows, whoever owns those, a warp every eighth of them, a thread
// 16 bytes of each. It leaves a sum in the workspace for each expert that has rows in its chunk; a second kernel adds
// up an expert's. Chunk c's sum for expert e is the workspace's row c + e: from one such pair to the next, in the order
// of the rows, at least one of the two grows and none shrinks, so no two share a row, and it has no more than there are
// chunks and experts. Everything is added in float32 in a fixed order, reruns are bitwise equal, and rounded once. Rows
// past the last expert's are not read.

#include "common.cuh"
#include "row_sums.h"

namespace moe_kernels {
namespace {

constexpr const char* kName = "row_sums";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunkRows = 256;
constexpr int kColumns = 256;  // of a block
constexpr int kWidth = 8;      // of a thread's vector
constexpr int kInFlight = 8;   // rows a thread loads before it adds them
static_assert(kColumns == kWarpSize * kWidth && kColumns == kThreads, "a warp reads a row, a thread adds up a column");

struct RowSums {
    void* sums;
    const void* rows;
    int64_t row_stride;  // elements
    float* workspace;
    const int* offsets;
    const int* slots;
    int top_k, num_experts, width, num_slabs;
};

template <typename T, bool kGather>
__global__ void __launch_bounds__(kThreads) sum_chunk_kernel(const RowSums p) {
    __shared__ alignas(16) float of_warp[kWarps][kColumns];
    const int slab = blockIdx.x % p.num_slabs, chunk = blockIdx.x / p.num_slabs;
    const int begin = chunk * kChunkRows;
    const int end = begin + min(kChunkRows, __ldg(p.offsets + p.num_experts) - begin);
    if (begin >= end) return;

    int expert = 0;  // the first that has rows here: as many end before
    for (int first = 0; first < p.num_experts; first += kThreads) {
        const int e = first + threadIdx.x;
        expert += __syncthreads_count(e < p.num_experts && __ldg(p.offsets + e + 1) <= begin);
    }

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int column = slab * kColumns + lane * kWidth, my_column = slab * kColumns + threadIdx.x;
    // Loads have no conditions, so that all are under way before the first is needed: a thread without columns reads
    // the first ones, and a row past the end is the last one again, not added.
    const T* data = static_cast<const T*>(p.rows) + (column < p.width ? column : 0);
    for (int row = begin; row < end; ++expert) {
        const int stop = min(end, __ldg(p.offsets + expert + 1));
        if (stop == row) continue;  // an expert without rows

        float total[kWidth] = {};
        for (int r = row + warp; r < stop; r += kWarps * kInFlight) {
            int source[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                source[i] = min(r + i * kWarps, stop - 1);
                if (kGather) source[i] = __ldg(p.slots + source[i]);
            }
            uint4 bits[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if (kGather) source[i] /= p.top_k;
                bits[i] = __ldg(reinterpret_cast<const uint4*>(data + source[i] * p.row_stride));
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                float values[kWidth];
                unpack(bits[i], values, data);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    if (r + i * kWarps < stop) total[j] += values[j];
                }
            }
        }

#pragma unroll
        for (int j = 0; j < kWidth; j += 4) {
            *reinterpret_cast<float4*>(&of_warp[warp][lane * kWidth + j]) =
                make_float4(total[j], total[j + 1], total[j + 2], total[j + 3]);
        }
        __syncthreads();
        if (my_column < p.width) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += of_warp[w][threadIdx.x];
            p.workspace[static_cast<int64_t>(chunk + expert) * p.width + my_column] = sum;
        }
        __syncthreads();  // before the next expert's
        row = stop;
    }
}

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

template <typename Out>
__global__ void __launch_bounds__(kThreads) sum_expert_kernel(const RowSums p) {
    const int slab = blockIdx.x % p.num_slabs, expert = blockIdx.x / p.num_slabs;
    const int column = slab * kColumns + threadIdx.x;
    if (column >= p.width) return;
    const int begin = __ldg(p.offsets + expert), end = __ldg(p.offsets + expert + 1);
    const int first = begin / kChunkRows, chunks = begin < end ? (end - 1) / kChunkRows - first + 1 : 0;
    const float* partial = p.workspace + static_cast<int64_t>(first + expert) * p.width + column;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < chunks; ++i) sum += __ldg(partial + static_cast<int64_t>(i) * p.width);
    store(static_cast<Out*>(p.sums) + static_cast<int64_t>(expert) * p.width + column, sum);
}

}  // namespace

int64_t row_sums_workspace(int64_t num_rows, int num_experts, int64_t width) {
    return (ceil_div(num_rows, kChunkRows) + num_experts) * width;
}

void row_sums(const RowSumsArguments& a, const Plan& plan, cudaStream_t stream) {
    using T = __nv_bfloat16;
    const Needs needs{kName};
    needs.plan(plan);
    needs.multiple("width", a.width, kWidth);
    needs.rows("rows", a.rows, a.row_stride, plan.slots == nullptr ? plan.num_rows : plan.num_rows / plan.top_k,
               sizeof(T));
    needs.present("sums", a.sums);
    needs.present("workspace", a.workspace);
    require(a.sums_dtype == DType::kFloat32 || a.sums_dtype == DType::kBFloat16, kName,
            ": sums_dtype must be bfloat16 or float32");

    const int width = static_cast<int>(a.width), num_slabs = static_cast<int>(ceil_div(width, kColumns));
    const RowSums p{a.sums,     a.rows,     a.row_stride,     a.workspace, plan.offsets,
                    plan.slots, plan.top_k, plan.num_experts, width,       num_slabs};
    const auto blocks = [&](int64_t parts) { return static_cast<unsigned>(parts * num_slabs); };
    const auto sum_chunk = plan.slots == nullptr ? sum_chunk_kernel<T, false> : sum_chunk_kernel<T, true>;
    sum_chunk<<<blocks(ceil_div(plan.num_rows, kChunkRows)), kThreads, 0, stream>>>(p);
    check_launch(kName);
    if (a.sums_dtype == DType::kFloat32) {
        sum_expert_kernel<float><<<blocks(plan.num_experts), kThreads, 0, stream>>>(p);
    } else {
        sum_expert_kernel<T><<<blocks(plan.num_experts), kThreads, 0, stream>>>(p);
    }
    check_launch(kName);
}

}  // namespace moe_kernels
