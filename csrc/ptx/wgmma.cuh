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

template <int kAcrossA, int kAcrossB>
struct Wgmma<__nv_bfloat16, 256, kAcrossA, kAcrossB> {
    static __device__ __forceinline__ void run(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "setp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
            "%128, %129, p, 1, 1, %131, %132;\n"
            "}\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
              "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
              "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
              "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
              "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
              "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
              "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
              "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
              "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
              "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),
              "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
              "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]),
              "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]),
              "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
            : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAcrossA), "n"(kAcrossB));
    }
};

}  // namespace moe_kernels::ptx
