// What every kernel file shares: error checks, 16-byte vectors and their conversion to float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "require.h"

namespace moe_kernels {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                                 ")");
    }
}

// A launch reports a bad configuration through the last error only.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sixteen bytes, the widest load a thread has, as floats.
template <typename T>
struct Vector {
    static constexpr int kWidth = 16 / sizeof(T);
};

__device__ __forceinline__ void unpack(const uint4& bits, float (&values)[4], const float*) {
    values[0] = __uint_as_float(bits.x);
    values[1] = __uint_as_float(bits.y);
    values[2] = __uint_as_float(bits.z);
    values[3] = __uint_as_float(bits.w);
}

__device__ __forceinline__ uint4 pack(const float (&values)[4], const float*) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
}

// A pair of 16-bit floats in a 32-bit word.
__device__ __forceinline__ float2 to_float2(uint32_t word, const __nv_bfloat16*) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ float2 to_float2(uint32_t word, const __half*) {
    return __half22float2(*reinterpret_cast<__half2*>(&word));
}

__device__ __forceinline__ uint32_t from_floats(float low, float high, const __nv_bfloat16*) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t from_floats(float low, float high, const __half*) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// The last argument only names the type of the data.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&values)[8], const T* type) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = to_float2(words[i], type);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[8], const T* type) {
    return make_uint4(from_floats(values[0], values[1], type), from_floats(values[2], values[3], type),
                      from_floats(values[4], values[5], type), from_floats(values[6], values[7], type));
}

}  // namespace moe_kernels
