// What the kernels of this folder share. Each is about one wrapper of csrc/ptx, or a small piece of csrc/sm90, and
// test_ptx.py's test of the same name says what it shows: that loads the folder as a library of plain functions.
//
// No kernel hangs where a wrapper is wrong: waits give up after a second and the results are then wrong, too. Where a
// wrapper under test does the waiting, a thread that only watches ends the kernel.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <exception>
#include <string>

#include "ptx/copy.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/pipeline.cuh"

namespace moe_kernels {

constexpr int kThreads = 128;
constexpr uint64_t kPatience = 1'000'000'000;  // ns

__device__ inline uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__device__ inline bool is_over(uint64_t* barrier, uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}\n"
        : "=r"(over)
        : "r"(ptx::shared_address(barrier)), "r"(parity)
        : "memory");
    return over;
}

// mbarrier_wait that gives up.
__device__ inline bool comes(uint64_t* barrier, uint32_t parity) {
    const uint64_t start = nanoseconds();
    do {
        if (is_over(barrier, parity)) return true;
    } while (nanoseconds() - start < kPatience);
    return false;
}

// The watching thread: the others count themselves when they are done.
__device__ inline void watch(const volatile int* done, int threads) {
    const uint64_t start = nanoseconds();
    while (*done != threads) {
        if (nanoseconds() - start > kPatience) __trap();
    }
}

__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, arrivals);
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
}

// A box of swizzled 128-byte rows in shared memory, from and to plain rows.
__device__ inline void fill_box(unsigned char* box, const uint4* rows, int num_rows) {
    for (int i = threadIdx.x; i < 8 * num_rows; i += blockDim.x) {
        *reinterpret_cast<uint4*>(box + swizzled(i / 8, i % 8)) = rows[i];
    }
}

__device__ inline void read_box(uint4* rows, const unsigned char* box, int num_rows) {
    for (int i = threadIdx.x; i < 8 * num_rows; i += blockDim.x) {
        rows[i] = *reinterpret_cast<const uint4*>(box + swizzled(i / 8, i % 8));
    }
}

// Before something else writes there: NaN in every type.
__device__ inline void poison(unsigned char* memory, int bytes) {
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
        reinterpret_cast<uint4*>(memory)[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
    ptx::fence_async_proxy();
    __syncthreads();
}

// Null, or what went wrong: exceptions end here.
template <typename Body>
const char* caught(Body body) {
    static std::string message;
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
    kernel<<<blocks, threads, bytes, stream>>>(arguments...);
    check_launch("kernel");
}

template <typename... Parameters, typename... Arguments>
const char* run(void (*kernel)(Parameters...), const Arguments&... arguments) {
    return caught([&] { launch(kernel, arguments...); });
}

}  // namespace moe_kernels
