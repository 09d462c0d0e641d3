// The Python module moe_kernels._C. It knows nothing of torch: tensors arrive as device pointers, sizes and strides,
// streams as handles, so one build serves every torch version. Importing it touches no driver and no GPU.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "combine.h"
#include "dtype.h"
#include "routing_plan.h"

namespace py = pybind11;
using namespace py::literals;
using namespace moe_kernels;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// The CUDA version that the driver supports, 1000 * major + 10 * minor; 0 without a driver.
int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

void bind_routing_plan(py::module_& m) {
    m.def("routing_plan_workspace", &routing_plan_workspace, py::kw_only(), "num_slots"_a, "num_experts"_a,
          "int32 words of scratch memory that routing_plan needs.");
    m.def(
        "routing_plan",
        [](uintptr_t indices, int index_bytes, int64_t num_slots, int num_experts, int block_m, int64_t num_tiles,
           uintptr_t workspace, uintptr_t offsets, uintptr_t slots, uintptr_t positions, uintptr_t tiles,
           uintptr_t stream) {
            routing_plan(pointer<const void>(indices), index_bytes, num_slots, num_experts, block_m, num_tiles,
                         pointer<int>(workspace), pointer<int>(offsets), pointer<int>(slots), pointer<int>(positions),
                         pointer<int>(tiles), stream_of(stream));
        },
        py::kw_only(), "indices"_a, "index_bytes"_a, "num_slots"_a, "num_experts"_a, "block_m"_a, "num_tiles"_a,
        "workspace"_a, "offsets"_a, "slots"_a, "positions"_a, "tiles"_a, "stream"_a);
}

void bind_combine(py::module_& m) {
    m.def(
        "combine",
        [](uintptr_t out, int64_t out_stride, uintptr_t y, int64_t y_stride, uintptr_t positions, uintptr_t weights,
           int weights_dtype, uintptr_t residual, int64_t residual_stride, int64_t tokens, int top_k, int width,
           int dtype, uintptr_t stream) {
            CombineArguments a{};
            a.out = pointer<void>(out);
            a.y = pointer<const void>(y);
            a.positions = pointer<const int>(positions);
            a.weights = pointer<const void>(weights);
            a.residual = pointer<const void>(residual);
            a.out_stride = out_stride;
            a.y_stride = y_stride;
            a.residual_stride = residual_stride;
            a.tokens = tokens;
            a.top_k = top_k;
            a.width = width;
            a.dtype = static_cast<DType>(dtype);
            a.weights_dtype = static_cast<DType>(weights_dtype);
            combine(a, stream_of(stream));
        },
        py::kw_only(), "out"_a, "out_stride"_a, "y"_a, "y_stride"_a, "positions"_a, "weights"_a, "weights_dtype"_a,
        "residual"_a, "residual_stride"_a, "tokens"_a, "top_k"_a, "width"_a, "dtype"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of moe_kernels, over raw device pointers.";

    m.attr("architectures") = MOE_KERNELS_ARCHITECTURES;  // e.g. "80,90,100,120"; the last one also as PTX
    m.attr("source_hash") = MOE_KERNELS_SOURCE_HASH;
    m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    m.attr("NONE") = static_cast<int>(DType::kNone);
    m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
    m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);
    m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);

    m.def("driver_version", &driver_version,
          "CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without a driver.");
    bind_routing_plan(m);
    bind_combine(m);
}
