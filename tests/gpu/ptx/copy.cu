// csrc/ptx/copy.cuh, single threads and warps.
#include "harness.cuh"

namespace moe_kernels {
namespace {

constexpr int kPieces = 1024;

// from [1024] -> to [2, 1024]: all of them, and those that `copied` says, zeros for the others.
__global__ void cp_async_kernel(uint4* to, const uint4* from, const bool* copied) {
    __shared__ __align__(16) unsigned char landed[2 * kPieces * 16];
    __shared__ uint64_t barrier;
    poison(landed, sizeof(landed));
    init_barrier(&barrier, kThreads);
    const uint32_t at = ptx::shared_address(landed);
    for (int i = threadIdx.x; i < kPieces; i += kThreads) {
        ptx::cp_async_16(at + i * 16, from + i);
        ptx::cp_async_16_or_zero(at + (kPieces + i) * 16, from + i, copied[i]);
    }
    ptx::mbarrier_arrive_after_copies(&barrier);
    comes(&barrier, 0);
    // Last copied, first read; by another thread than the one that copied it.
    for (int i = threadIdx.x; i < 2 * kPieces; i += kThreads) {
        const int piece = 2 * kPieces - 1 - i;
        to[piece] = reinterpret_cast<const uint4*>(landed)[piece];
    }
}

// Where row l % 8 of matrix l / 8 lies, in rows: neighbours apart, so that every lane's address counts.
__device__ int place(int lane) { return 5 * lane % kWarpSize; }

// words [32 lanes, 4] -> rows [32 places]
template <bool kTransposed>
__global__ void stmatrix_kernel(uint4* rows, const uint4* words) {
    __shared__ uint4 matrices[kWarpSize];
    const int lane = threadIdx.x;
    const uint4 mine = words[lane];
    const uint32_t of_lane[4] = {mine.x, mine.y, mine.z, mine.w};
    const uint32_t address = ptx::shared_address(matrices + place(lane));
    if constexpr (kTransposed) {
        ptx::stmatrix_x4_transposed(address, of_lane);
    } else {
        ptx::stmatrix_x4(address, of_lane);
    }
    __syncwarp();
    rows[lane] = matrices[lane];
}

// rows [32 places] -> words [32 lanes, 4]
__global__ void ldmatrix_kernel(uint4* words, const uint4* rows) {
    __shared__ uint4 matrices[kWarpSize];
    const int lane = threadIdx.x;
    matrices[lane] = rows[lane];
    __syncwarp();
    uint32_t of_lane[4];
    ptx::ldmatrix_x4(ptx::shared_address(matrices + place(lane)), of_lane);
    words[lane] = make_uint4(of_lane[0], of_lane[1], of_lane[2], of_lane[3]);
}

}  // namespace

extern "C" {

const char* cp_async(uint4* to, const uint4* from, const bool* copied, cudaStream_t stream) {
    return run(cp_async_kernel, 1, kThreads, 0, stream, to, from, copied);
}

const char* stmatrix(uint4* rows, const uint4* words, int transposed, cudaStream_t stream) {
    return run(transposed ? stmatrix_kernel<true> : stmatrix_kernel<false>, 1, kWarpSize, 0, stream, rows, words);
}

const char* ldmatrix(uint4* words, const uint4* rows, cudaStream_t stream) {
    return run(ldmatrix_kernel, 1, kWarpSize, 0, stream, words, rows);
}

}  // extern "C"

}  // namespace moe_kernels
