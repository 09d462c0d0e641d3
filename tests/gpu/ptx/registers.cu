// csrc/ptx/registers.cuh.
#include "harness.cuh"
#include "ptx/registers.cuh"

namespace moe_kernels {
namespace {

constexpr int kHeld = 192;  // more than the registers of a thread of so large a block

// values [192, 256] upside down, all of them in the consumers' registers in between; the producer's warpgroup gives
// the registers for that, and watches.
__global__ void __launch_bounds__(kBlockThreads, 1) registers_kernel(volatile int* values) {
    __shared__ int done;
    if (threadIdx.x == 0) done = 0;
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        ptx::give_registers<64>();
        if (threadIdx.x == 0) watch(&done, kConsumers * kWarpgroup);
    } else {
        ptx::take_registers<216>();
        values += threadIdx.x - kWarpgroup;
        int held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held[i] = values[i * kConsumers * kWarpgroup];
        warpgroup_sync(threadIdx.x / kWarpgroup - 1);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) values[i * kConsumers * kWarpgroup] = held[kHeld - 1 - i];
        atomicAdd(&done, 1);
    }
}

}  // namespace

extern "C" {

const char* registers(int* values, cudaStream_t stream) {
    return run(registers_kernel, 1, kBlockThreads, 0, stream, values);
}

}  // extern "C"

}  // namespace moe_kernels
