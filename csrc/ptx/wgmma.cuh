// wgmma: the tensor-core product of one warpgroup (128 threads), operands in shared memory, accumulator in registers.
//
//     D[64, N] += A[64, 16] . B[16, N]
//
// Accumulator: thread t holds, for every group j of 8 columns, d[4j], d[4j+1] at row 16 * (t / 32) + t % 32 / 4,
// columns 8j + 2 * (t % 4) and the next, and d[4j+2], d[4j+3] eight rows below. Operands lie in the copy engine's
// 128-byte swizzle; a descriptor names them. PTX ISA, "asynchronous warpgroup level matrix instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// The accumulators as operands, by tens: ten of them from 10 * t on (t is empty for the first), as the text names them
// and what they are; and the first ninety.
// clang-format off
#define MOE_KERNELS_NAMES(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define MOE_KERNELS_VALUES(t) \
    "+f"(d[t##0]), "+f"(d[t##1]), "+f"(d[t##2]), "+f"(d[t##3]), "+f"(d[t##4]), \
    "+f"(d[t##5]), "+f"(d[t##6]), "+f"(d[t##7]), "+f"(d[t##8]), "+f"(d[t##9])
#define MOE_KERNELS_90_NAMES \
    MOE_KERNELS_NAMES() MOE_KERNELS_NAMES(1) MOE_KERNELS_NAMES(2) MOE_KERNELS_NAMES(3) MOE_KERNELS_NAMES(4) \
    MOE_KERNELS_NAMES(5) MOE_KERNELS_NAMES(6) MOE_KERNELS_NAMES(7) MOE_KERNELS_NAMES(8)
#define MOE_KERNELS_90_VALUES \
    MOE_KERNELS_VALUES(), MOE_KERNELS_VALUES(1), MOE_KERNELS_VALUES(2), MOE_KERNELS_VALUES(3), MOE_KERNELS_VALUES(4), \
    MOE_KERNELS_VALUES(5), MOE_KERNELS_VALUES(6), MOE_KERNELS_VALUES(7), MOE_KERNELS_VALUES(8)
// clang-format on

template <int kAcrossA, int kAcrossB>
struct Wgmma<__nv_bfloat16, 256, kAcrossA, kAcrossB> {
    static __device__ __forceinline__ void run(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "setp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" MOE_KERNELS_90_NAMES
            MOE_KERNELS_NAMES(9) MOE_KERNELS_NAMES(10) MOE_KERNELS_NAMES(11)
            "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, %131, %132;\n"
            "}\n"
            : MOE_KERNELS_90_VALUES, MOE_KERNELS_VALUES(9), MOE_KERNELS_VALUES(10), MOE_KERNELS_VALUES(11), "+f"(d[120]),
              "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
            : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));
    }
};

template <int kAcrossA, int kAcrossB>
struct Wgmma<__nv_bfloat16, 192, kAcrossA, kAcrossB> {
    static __device__ __forceinline__ void run(float (&d)[96], uint64_t a, uint64_t b, bool accumulate) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "setp.ne.b32 p, %98, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" MOE_KERNELS_90_NAMES
            "%90, %91, %92, %93, %94, %95}, %96, %97, p, 1, 1, %99, %100;\n"
            "}\n"
            : MOE_KERNELS_90_VALUES, "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
            : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));
    }
};

#undef MOE_KERNELS_NAMES
#undef MOE_KERNELS_VALUES
#undef MOE_KERNELS_90_NAMES
#undef MOE_KERNELS_90_VALUES

}  // namespace moe_kernels::ptx
