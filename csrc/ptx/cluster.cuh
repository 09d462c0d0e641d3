// Clusters: blocks that run side by side and reach each other's shared memory.
#pragma once

#include <cstdint>

#include "mbarrier.cuh"

namespace moe_kernels::ptx {

__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// All threads of all blocks of the cluster meet; what they wrote before is seen after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where block `rank` has what this block has at `pointer`.
__device__ __forceinline__ uint32_t address_in(const void* pointer, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
    return address;
}

// Says that what the barrier guards is no longer read, wgmma's and the copy engine's reads having been waited for. Of
// ordinary writes it says nothing to the other block, the default scope being this one: nobody there reads any.
__device__ __forceinline__ void mbarrier_arrive_in(uint64_t* barrier, int rank, int arrivals = 1) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(address_in(barrier, rank)), "r"(arrivals)
                 : "memory");
}

// Sixteen bytes into block `rank`, counted on its barrier like those of a bulk copy.
__device__ __forceinline__ void store_async_in(const void* pointer, uint64_t* barrier, int rank, int4 value) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
                     address_in(pointer, rank)),
                 "r"(address_in(barrier, rank)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

}  // namespace moe_kernels::ptx
