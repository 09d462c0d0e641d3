// The driver's encoder is looked up at run time: the extension links no libcuda and loads where there is no driver.
#include "tensor_map.h"

#include <cuda_runtime.h>

#include <stdexcept>

#include "require.h"

namespace moe_kernels {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        throw std::runtime_error("the driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer is needed)");
    }
    return reinterpret_cast<Encode>(function);
}

struct Element {
    CUtensorMapDataType type;
    uint32_t bytes;
};

Element element_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};
        case DType::kBFloat16: return {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2};
        default: return {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2};
    }
}

}  // namespace

CUtensorMap make_tensor_map(const TensorMapShape& s, DType dtype) {
    static const Encode encode = find_encode();
    const Element element = element_of(dtype);
    // torch leaves the stride of a dimension of size 1 as it happens to be; the driver wants a legal one all the same.
    const int64_t stride1 = s.size1 == 1 ? s.size0 : s.stride1;
    const int64_t stride2 = s.size2 == 1 ? s.size1 * stride1 : s.stride2;
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(s.size0), static_cast<cuuint64_t>(s.size1),
                                 static_cast<cuuint64_t>(s.size2)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride1) * element.bytes,
                                   static_cast<cuuint64_t>(stride2) * element.bytes};
    const cuuint32_t box[3] = {128 / element.bytes, static_cast<cuuint32_t>(s.box1), static_cast<cuuint32_t>(s.box2)};
    const cuuint32_t steps[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult error = encode(&map, element.type, 3, const_cast<void*>(s.data), sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with error ", error, " for sizes [", s.size2, ", ",
            s.size1, ", ", s.size0, "], strides [", stride2, ", ", stride1, ", 1]");
    return map;
}

}  // namespace moe_kernels
