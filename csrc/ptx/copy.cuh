// Copies: by the copy engine (TMA, tensor maps), by single threads (cp.async), between registers and shared memory in
// the layout of matrix fragments (ldmatrix, stmatrix), and the fences between them.
//
// The copy engine and wgmma reach shared memory through another proxy than ordinary loads and stores. Between the two
// stands a fence_async_proxy(): said by the thread that wrote (stmatrix too) before it tells others to let the former
// read; where cp.async wrote, which is done only some time after its thread has gone on, by the threads that read,
// after they have waited for it.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "mbarrier.cuh"

namespace moe_kernels::ptx {

// One lane of a whole warp, always the same, for the copy engine's work. The engine takes its operands from registers
// that the lanes share. Under a branch on this, and under no other, the compiler knows that there is one lane to take
// them from; elsewhere it puts a loop over the lanes around each copy, a hundred clocks or more.
__device__ __forceinline__ bool elect() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
}

__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Box at (c0, c1, c2), innermost coordinate first, to shared memory; its bytes count on the barrier.
__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                                            int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// The same box into the same place of every block of the cluster that `blocks` has a bit for, counting on each one's
// barrier.
__device__ __forceinline__ void tma_load_3d_multicast(void* to, const CUtensorMap* map, uint64_t* barrier, int c0,
                                                      int c1, int c2, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
        : "memory");
}

// Shared memory to the box at (c0, c1, c2); elements outside the tensor are left out.
__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, const void* from, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// The same, each element added to what is there, in the tensor's type.
__device__ __forceinline__ void tma_add_3d(const CUtensorMap* map, const void* from, int c0, int c1, int c2) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the newest `kPending` committed groups of this thread have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until they have written, too.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Sixteen bytes from global to shared memory, past the L1.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same, or sixteen zero bytes.
__device__ __forceinline__ void cp_async_16_or_zero(uint32_t to, const void* from, bool copy) {
    const int bytes = copy ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8; word i of a thread is
// its pair of elements (row lane / 4, columns 2 * (lane % 4) and the next) of matrix i.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// The same, each matrix transposed on its way.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, const uint32_t (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t (&words)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

}  // namespace moe_kernels::ptx
