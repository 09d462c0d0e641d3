// wgmma: the tensor-core product of one warpgroup (128 threads), operands in shared memory, accumulator in registers.
//
//     D[64, N] += A[64, 16] . B[16, N]
//
// Accumulator: thread t holds, for every group j of 8 columns, d[4j], d[4j+1] at row 16 * (t / 32) + t % 32 / 4,
// columns 8j + 2 * (t % 4) and the next, and d[4j+2], d[4j+3] eight rows below. Operands lie in the copy engine's
// 128-byte swizzle; a descriptor names them. PTX ISA, "asynchronous warpgroup level matrix instructions".
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "mbarrier.cuh"

namespace moe_kernels::ptx {

// Rows of the matrix that lie 128 bytes (64 elements) apart are grouped by eight: 1024 bytes, the swizzle's period.
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;

// An operand whose rows run along the reduction: 64 elements of it a row, one row per M or N.
// The next 16 elements of the reduction: + kNextAlong.
__device__ __forceinline__ uint64_t descriptor_along(const void* operand) {
    return kSwizzle128 | kEightRows | ((shared_address(operand) & 0x3ffff) >> 4);
}
constexpr uint64_t kNextAlong = 32 >> 4;

// An operand whose rows run across it: 64 elements of M or N a row, one row per reduction step; wider operands go on
// `block_bytes` further. The next 16 steps of the reduction: + kNextAcross.
__device__ __forceinline__ uint64_t descriptor_across(const void* operand, int block_bytes) {
    return kSwizzle128 | kEightRows | (static_cast<uint64_t>(block_bytes >> 4) << 16) |
           ((shared_address(operand) & 0x3ffff) >> 4);
}
constexpr uint64_t kNextAcross = 2048 >> 4;

// Before the first product: the registers and what was written to shared memory are seen.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups of products are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Until all are finished. The accumulator may be read only after this: naming it keeps the compiler from reading it
// early.
template <int kSize>
__device__ __forceinline__ void wgmma_wait_all(float (&d)[kSize]) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// One product. kAcrossA, kAcrossB: the operand is stored across (see above). accumulate false: D is overwritten.
template <typename T, int kN, int kAcrossA, int kAcrossB>
struct Wgmma;

// WGMMA_<size>, WGMMA_D<size>: so many accumulators, in the text of the instruction and as its operands.
#define WGMMA_96                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_104 WGMMA_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_128                                                                \
    WGMMA_104                                                                    \
    ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, " \
    "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D8(i)                                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define WGMMA_D32(i) WGMMA_D8(i), WGMMA_D8(i + 8), WGMMA_D8(i + 16), WGMMA_D8(i + 24)
#define WGMMA_D96 WGMMA_D32(0), WGMMA_D32(32), WGMMA_D32(64)
#define WGMMA_D104 WGMMA_D96, WGMMA_D8(96)
#define WGMMA_D128 WGMMA_D96, WGMMA_D32(96)

// For operands of `type` and n columns of B. Operands go by number: the accumulators from 0, then A (hence `size`), B
// and the others.
#define WGMMA_OF(type, name, n, size, at_b, at_accumulate, across_a, across_b)                                         \
    template <int kAcrossA, int kAcrossB>                                                                              \
    struct Wgmma<type, n, kAcrossA, kAcrossB> {                                                                        \
        static __device__ __forceinline__ void run(float (&d)[size], uint64_t a, uint64_t b, bool accumulate) {        \
            asm volatile(                                                                                              \
                "{\n"                                                                                                  \
                ".reg .pred p;\n"                                                                                      \
                "setp.ne.b32 p, %" #at_accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #name        \
                "." #name " {" WGMMA_##size "}, %" #size ", %" #at_b ", p, 1, 1, %" #across_a ", %" #across_b ";\n}\n" \
                : WGMMA_D##size                                                                                        \
                : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));                    \
        }                                                                                                              \
    };

#define WGMMA(...)                             \
    WGMMA_OF(__nv_bfloat16, bf16, __VA_ARGS__) \
    WGMMA_OF(__half, f16, __VA_ARGS__)

WGMMA(192, 96, 97, 98, 99, 100)
WGMMA(208, 104, 105, 106, 107, 108)
WGMMA(256, 128, 129, 130, 131, 132)

#undef WGMMA
#undef WGMMA_OF
#undef WGMMA_96
#undef WGMMA_104
#undef WGMMA_128
#undef WGMMA_D8
#undef WGMMA_D32
#undef WGMMA_D96
#undef WGMMA_D104
#undef WGMMA_D128

}  // namespace moe_kernels::ptx
