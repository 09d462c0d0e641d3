// csrc/ptx/copy.cuh, the copy engine (TMA), with maps from csrc/tensor_map.cpp.
#include "harness.cuh"
#include "ptx/cluster.cuh"
#include "tensor_map.h"

namespace moe_kernels {
namespace {

constexpr int kBox1 = 16, kBox2 = 2, kBoxRows = kBox1 * kBox2;
constexpr int kBoxBytes = kAlignment + kBoxRows * kRowBytes;  // and what aligning it takes

__global__ void tma_load_kernel(const __grid_constant__ CUtensorMap map, uint4* box, int c0, int c1, int c2) {
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t barrier;
    unsigned char* landed = aligned(memory);
    poison(landed, kBoxRows * kRowBytes);
    init_barrier(&barrier, 1);
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&barrier, kBoxRows * kRowBytes);
        ptx::tma_load_3d(landed, &map, &barrier, c0, c1, c2);
    }
    comes(&barrier, 0);
    read_box(box, landed, kBoxRows);
}

// Chunks 0 and 1 of the tensor from blocks 0 and 1 to both, chunk 2 from block 0 to block 1: chunks [2, 3, 64 rows].
__global__ void __cluster_dims__(kCluster, 1, 1)
    tma_load_multicast_kernel(const __grid_constant__ CUtensorMap map, uint4* chunks) {
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t barrier;
    unsigned char* landed = aligned(memory);
    const int rank = ptx::cluster_rank();
    poison(landed, 3 * kChunkBytes);
    init_barrier(&barrier, 1);
    ptx::cluster_sync();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&barrier, (2 + rank) * kChunkBytes);
        ptx::tma_load_3d_multicast(landed + rank * kChunkBytes, &map, &barrier, 0, 0, rank, kBothBlocks);
        if (rank == 0) ptx::tma_load_3d_multicast(landed + 2 * kChunkBytes, &map, &barrier, 0, 0, 2, 1 << 1);
    }
    comes(&barrier, 0);
    ptx::cluster_sync();
    read_box(chunks + rank * 3 * kChunkBytes / 16, landed, 3 * 64);
}

template <bool kAdd>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, const uint4* box, int c0, int c1, int c2) {
    extern __shared__ unsigned char memory[];
    unsigned char* from = aligned(memory);
    fill_box(from, box, kBoxRows);
    ptx::fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        (kAdd ? ptx::tma_add_3d : ptx::tma_store_3d)(&map, from, c0, c1, c2);
        ptx::bulk_commit();
        ptx::bulk_wait<0>();
    }
}

// Whether each lane was elected, twice: elected [2, threads].
__global__ void elect_kernel(int* elected) {
    for (int i = 0; i < 2; ++i) elected[i * blockDim.x + threadIdx.x] = ptx::elect() ? 1 : 0;
}

constexpr int kBulkBoxes = 32, kBulkRows = 256;

// Box i of `boxes` [32, 256, 32] is all i + 1, by way of buffers that are used again as soon as they have been read.
// What the thread that waits finds in the last box: seen [256].
template <int kCopyBuffers>
__global__ void bulk_groups_kernel(const __grid_constant__ CUtensorMap map, const volatile float* boxes, float* seen) {
    extern __shared__ unsigned char memory[];
    constexpr int kBytes = kBulkRows * kRowBytes;
    for (int i = 0; i < kBulkBoxes; ++i) {
        unsigned char* buffer = aligned(memory) + i % kCopyBuffers * kBytes;
        if (threadIdx.x == 0) ptx::bulk_wait_read<kCopyBuffers - 1>();
        __syncthreads();
        for (int j = threadIdx.x; j < kBytes / 16; j += blockDim.x) {
            reinterpret_cast<float4*>(buffer)[j] = make_float4(i + 1, i + 1, i + 1, i + 1);
        }
        ptx::fence_async_proxy();
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::tma_store_3d(&map, buffer, 0, 0, i);
            ptx::bulk_commit();
        }
    }
    if (threadIdx.x == 0) {
        ptx::bulk_wait<0>();
        boxes += (kBulkBoxes - 1) * kBulkRows * 32;
        for (int row = kBulkRows - 1; row >= 0; --row) seen[row] = boxes[row * 32];  // the last to be written first
    }
}

}  // namespace

extern "C" {

const char* elect(int* elected, int warps, cudaStream_t stream) {
    return run(elect_kernel, 1, warps * kWarpSize, 0, stream, elected);
}

// Tensor [size2, size1, size0], boxes [2, 16, 128 bytes].
const char* tma_load(void* box, const void* tensor, int dtype, int size0, int size1, int size2, int stride1,
                     int stride2, int c0, int c1, int c2, cudaStream_t stream) {
    return caught([&] {
        const auto map = make_tensor_map({tensor, size0, size1, size2, stride1, stride2, kBox1, kBox2}, DType(dtype));
        launch(tma_load_kernel, 1, kThreads, kBoxBytes, stream, map, static_cast<uint4*>(box), c0, c1, c2);
    });
}

const char* tma_store(void* tensor, const void* box, int dtype, int size0, int size1, int size2, int stride1,
                      int stride2, int c0, int c1, int c2, int add, cudaStream_t stream) {
    return caught([&] {
        const auto map = make_tensor_map({tensor, size0, size1, size2, stride1, stride2, kBox1, kBox2}, DType(dtype));
        launch(add ? tma_store_kernel<true> : tma_store_kernel<false>, 1, kThreads, kBoxBytes, stream, map,
               static_cast<const uint4*>(box), c0, c1, c2);
    });
}

const char* tma_load_multicast(uint4* landed, const void* chunks, cudaStream_t stream) {
    return caught([&] {
        const auto map = make_tensor_map({chunks, 64, 64, 3, 64, 64 * 64, 64, 1}, DType::kBFloat16);
        launch(tma_load_multicast_kernel, kCluster, kThreads, kAlignment + 3 * kChunkBytes, stream, map, landed);
    });
}

const char* bulk_groups(float* boxes, float* seen, int buffers, cudaStream_t stream) {
    return caught([&] {
        const auto map =
            make_tensor_map({boxes, 32, kBulkRows, kBulkBoxes, 32, 32 * kBulkRows, kBulkRows, 1}, DType::kFloat32);
        launch(buffers == 1 ? bulk_groups_kernel<1> : bulk_groups_kernel<2>, 1, 2 * kThreads,
               kAlignment + buffers * kBulkRows * kRowBytes, stream, map, boxes, seen);
    });
}

}  // extern "C"

}  // namespace moe_kernels
