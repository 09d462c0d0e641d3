// The weights of the experts as the kernels take them.
#pragma once

#include <cstdint>

namespace moe_kernels {

// [E, rows, columns] of 16-bit elements, columns with stride 1, rows 16-byte aligned.
struct Weights {
    const void* data;
    int64_t rows, columns;
    int64_t row_stride, expert_stride;  // elements
};

}  // namespace moe_kernels
