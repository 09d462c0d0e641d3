// The element types the kernels take, as the codes that cross the Python boundary.
#pragma once

namespace moe_kernels {

enum class DType : int { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace moe_kernels
