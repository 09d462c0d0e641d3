// Launches of kernels whose threads own 16 bytes of one token's row and go through its K expert rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common.cuh"
#include "dtype.h"
#include "require.h"

namespace moe_kernels {

// Blocks of kThreads: x along the rows, y over tokens. launch(element, top_k, grid, block): the types of the first two
// choose the kernel; top_k 0 takes any K.
template <typename T, int kThreads, typename Arguments, typename Launch>
void launch_token_rows(const Arguments& a, Launch launch) {
    const int64_t vectors = ceil_div(a.width, Vector<T>::kWidth);
    int across = kWarpSize;
    while (across < kThreads && across < vectors) across *= 2;
    const dim3 block(across, kThreads / across);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.tokens, block.y)),
                    static_cast<unsigned>(ceil_div(vectors, across)));
    switch (a.top_k) {
        case 1: return launch(T(), std::integral_constant<int, 1>(), grid, block);
        case 2: return launch(T(), std::integral_constant<int, 2>(), grid, block);
        case 4: return launch(T(), std::integral_constant<int, 4>(), grid, block);
        case 6: return launch(T(), std::integral_constant<int, 6>(), grid, block);
        case 8: return launch(T(), std::integral_constant<int, 8>(), grid, block);
        default: return launch(T(), std::integral_constant<int, 0>(), grid, block);
    }
}

template <int kThreads, typename Arguments, typename Launch>
void launch_token_rows(const char* op, const Arguments& a, Launch launch) {
    switch (a.dtype) {
        case DType::kFloat32: return launch_token_rows<float, kThreads>(a, launch);
        case DType::kBFloat16: return launch_token_rows<__nv_bfloat16, kThreads>(a, launch);
        case DType::kFloat16: return launch_token_rows<__half, kThreads>(a, launch);
        default: require(false, op, ": dtype must be float32, bfloat16 or float16");
    }
}

}  // namespace moe_kernels
