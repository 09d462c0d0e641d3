// csrc/ptx/cluster.cuh: pairs of blocks.
#include "harness.cuh"
#include "ptx/cluster.cuh"

namespace moe_kernels {
namespace {

// ranks [blocks], seen [blocks, 2, 128]: what both blocks of the cluster had written, one of them late.
__global__ void __cluster_dims__(kCluster, 1, 1) cluster_kernel(int* ranks, int* seen) {
    __shared__ int numbers[kThreads];
    const int rank = ptx::cluster_rank(), thread = threadIdx.x;
    if (thread == 0) ranks[blockIdx.x] = rank;
    if (rank == 1) __nanosleep(50000);
    numbers[thread] = blockIdx.x * kThreads + thread;
    ptx::cluster_sync();
    for (int of = 0; of < kCluster; ++of) {
        const int i = kThreads - 1 - thread;
        int number;
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(number) : "r"(ptx::address_in(numbers + i, of)));
        seen[(blockIdx.x * kCluster + of) * kThreads + i] = number;
    }
    ptx::cluster_sync();  // what is read must not be gone
}

// over [blocks, 3]
__global__ void __cluster_dims__(kCluster, 1, 1) mbarrier_arrive_in_kernel(int* over) {
    __shared__ uint64_t barrier;
    init_barrier(&barrier, 4);
    const int rank = ptx::cluster_rank();
    const bool first = threadIdx.x == 0;
    over += blockIdx.x * 3;
    ptx::cluster_sync();
    if (first && rank == 0) {  // both to block 1
        ptx::mbarrier_arrive_in(&barrier, 1, 3);
        ptx::mbarrier_arrive_in(&barrier, 1);
    }
    if (first && rank == 1) over[0] = comes(&barrier, 0);
    ptx::cluster_sync();
    if (first) {
        if (rank == 0) over[0] = is_over(&barrier, 0);
        ptx::mbarrier_arrive_in(&barrier, rank, 4);  // to itself: block 0's first phase, block 1's second
        over[1] = comes(&barrier, rank);
    }
    ptx::cluster_sync();
    if (first && rank == 1) ptx::mbarrier_arrive_in(&barrier, 0, 4);
    if (first) over[2] = rank == 0 ? comes(&barrier, 1) : is_over(&barrier, 0);
    ptx::cluster_sync();
}

// Every block sends its 32 pieces to both blocks of the cluster: from [blocks, 32] -> to [blocks, 2, 32].
__global__ void __cluster_dims__(kCluster, 1, 1) store_async_in_kernel(int4* to, const int4* from) {
    __shared__ int4 pieces[kCluster][kWarpSize];
    __shared__ uint64_t barrier;
    init_barrier(&barrier, 1);
    const int rank = ptx::cluster_rank(), lane = threadIdx.x;
    ptx::cluster_sync();
    if (lane == 0) ptx::mbarrier_arrive_expect(&barrier, sizeof(pieces));
    for (int block = 0; block < kCluster; ++block) {
        ptx::store_async_in(&pieces[rank][lane], &barrier, block, from[blockIdx.x * kWarpSize + lane]);
    }
    comes(&barrier, 0);
    for (int block = 0; block < kCluster; ++block) {
        to[(blockIdx.x * kCluster + block) * kWarpSize + lane] = pieces[block][lane];
    }
    ptx::cluster_sync();
}

}  // namespace

extern "C" {

const char* cluster(int* ranks, int* seen, int blocks, cudaStream_t stream) {
    return run(cluster_kernel, blocks, kThreads, 0, stream, ranks, seen);
}

const char* mbarrier_arrive_in(int* over, int blocks, cudaStream_t stream) {
    return run(mbarrier_arrive_in_kernel, blocks, kWarpSize, 0, stream, over);
}

const char* store_async_in(int4* to, const int4* from, int blocks, cudaStream_t stream) {
    return run(store_async_in_kernel, blocks, kWarpSize, 0, stream, to, from);
}

}  // extern "C"

}  // namespace moe_kernels
