// csrc/ptx/mbarrier.cuh; mbarrier_arrive_after_copies is in copy.cu.
#include "harness.cuh"

namespace moe_kernels {
namespace {

// What one thread finds after each step of a phase: over [rounds, 7].
__global__ void mbarrier_phases_kernel(int* over, int rounds) {
    __shared__ uint64_t barrier;
    init_barrier(&barrier, 4);
    auto complete_bytes = [&](uint32_t bytes) {
        asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(ptx::shared_address(&barrier)),
                     "r"(bytes)
                     : "memory");
    };
    for (int round = 0; round < rounds; ++round) {
        const uint32_t parity = round & 1;
        *over++ = is_over(&barrier, parity);
        ptx::mbarrier_arrive(&barrier);
        *over++ = is_over(&barrier, parity);
        ptx::mbarrier_arrive_expect(&barrier, 48);
        *over++ = is_over(&barrier, parity);
        ptx::mbarrier_arrive(&barrier, 2);
        *over++ = is_over(&barrier, parity);
        complete_bytes(16);
        *over++ = is_over(&barrier, parity);
        complete_bytes(32);
        *over++ = comes(&barrier, parity);
        *over++ = is_over(&barrier, parity ^ 1);
    }
}

// A warp hands numbers to four others, round after round, one lane late: seen [rounds, 128].
__global__ void mbarrier_wait_kernel(int* seen, int rounds) {
    __shared__ uint64_t full, empty;
    __shared__ int numbers[kWarpSize], done;
    init_barrier(&full, kWarpSize);
    init_barrier(&empty, kThreads);
    if (threadIdx.x == 0) done = 0;
    __syncthreads();
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (warp < kThreads / kWarpSize) {
        for (int round = 0; round < rounds; ++round) {
            ptx::mbarrier_wait(&full, round & 1);
            seen[round * kThreads + threadIdx.x] = numbers[(threadIdx.x + round) % kWarpSize];
            ptx::mbarrier_arrive(&empty);
        }
        atomicAdd(&done, 1);
    } else if (warp == kThreads / kWarpSize) {
        for (int round = 0; round < rounds; ++round) {
            ptx::mbarrier_wait(&empty, round & 1 ^ 1);  // the phase before the first is over
            if (lane == round % kWarpSize) __nanosleep(2000);
            numbers[lane] = round * kWarpSize + lane;
            ptx::mbarrier_arrive(&full);
        }
        atomicAdd(&done, 1);
    } else if (lane == 0) {
        watch(&done, kThreads + kWarpSize);
    }
}

}  // namespace

extern "C" {

const char* mbarrier_phases(int* over, int rounds, cudaStream_t stream) {
    return run(mbarrier_phases_kernel, 1, 1, 0, stream, over, rounds);
}

const char* mbarrier_wait(int* seen, int rounds, cudaStream_t stream) {
    return run(mbarrier_wait_kernel, 1, kThreads + 2 * kWarpSize, 0, stream, seen, rounds);
}

}  // extern "C"

}  // namespace moe_kernels
