// Tensor maps: how the copy engine (TMA) is told of a tensor. Encoded on the host by the driver, passed by value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "dtype.h"

namespace moe_kernels {

// A tensor [size2, size1, size0]: size0 has stride 1, the others strides in elements (multiples of 16 bytes; of no
// account where the size is 1). A box is [box2, box1, 128 bytes], swizzled. What a load reads outside the tensor is
// zero.
struct TensorMapShape {
    const void* data;  // 16-byte aligned
    int64_t size0, size1, size2;
    int64_t stride1, stride2;
    int box1, box2;
};

CUtensorMap make_tensor_map(const TensorMapShape& shape, DType dtype);

}  // namespace moe_kernels
