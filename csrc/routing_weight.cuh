// Routing weights, in whatever type the router gave them.
#pragma once

#include "common.cuh"
#include "dtype.h"
#include "require.h"

namespace moe_kernels {

// Weight i as a float; 1 where there are none.
__device__ __forceinline__ float load_weight(const void* weights, DType dtype, int64_t i) {
    switch (dtype) {
        case DType::kFloat32: return static_cast<const float*>(weights)[i];
        case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[i]);
        case DType::kFloat16: return __half2float(static_cast<const __half*>(weights)[i]);
        default: return 1.0f;
    }
}

// Null and kNone belong together.
inline void require_weights(const Needs& needs, const void* weights, DType dtype) {
    if (weights == nullptr && dtype == DType::kNone) return;
    needs.present("weights", weights);
    needs.dtype("weights_dtype", dtype);
}

}  // namespace moe_kernels
