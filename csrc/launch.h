// Where a kernel runs whose clusters draw their tiles from a counter.
#pragma once

#include <cuda_runtime.h>

namespace moe_kernels {

struct Launch {
    int num_sms;
    int* counter;  // a word of scratch memory, nobody else's until the kernel has finished
    cudaStream_t stream;
};

}  // namespace moe_kernels
