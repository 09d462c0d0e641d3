// The driver's encoder is looked up at run time: the extension links no libcuda and loads where there is no driver.
#include "tensor_map.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

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
    const cuuint64_t sizes[3] = {s.size0, s.size1, s.size2};
    const cuuint64_t strides[2] = {s.stride1 * element.bytes, s.stride2 * element.bytes};
    const cuuint32_t box[3] = {128 / element.bytes, s.box1, s.box2};
    const cuuint32_t steps[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult error = encode(&map, element.type, 3, const_cast<void*>(s.data), sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) {
        throw std::invalid_argument("cuTensorMapEncodeTiled failed with error " + std::to_string(error) +
                                    " for sizes [" + std::to_string(s.size2) + ", " + std::to_string(s.size1) + ", " +
                                    std::to_string(s.size0) + "], strides [" + std::to_string(s.stride2) + ", " +
                                    std::to_string(s.stride1) + ", 1]");
    }
    return map;
}

}  // namespace moe_kernels
