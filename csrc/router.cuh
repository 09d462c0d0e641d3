// What topk_route and its backward share: a token's row in the registers of a team of lanes, and the scores.
//
// A team is kLanes neighbouring lanes of a warp and holds kLanes * kValues logits, kQuad neighbours a load: value j of
// a lane is expert (j / kQuad * kLanes + lane) * kQuad + j % kQuad, so that a team's loads are contiguous.
#pragma once

#include <cmath>

#include "activation.cuh"
#include "common.cuh"
#include "dtype.h"
#include "require.h"
#include "topk_route.h"

namespace moe_kernels {

constexpr int kQuad = 4;
constexpr int kMostExperts = 1024;
constexpr int kMostChosen = 32;

inline void require_rule(const Needs& needs, const RouteRule& rule) {
    require(rule.scoring >= Scoring::kSoftmax && rule.scoring <= Scoring::kSqrtSoftplus, needs.op, ": no scoring ",
            static_cast<int>(rule.scoring));
    needs.dtype("step", rule.step);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

template <int kLanes>
__device__ __forceinline__ int expert_of(int j, int lane) {
    return (j / kQuad * kLanes + lane) * kQuad + j % kQuad;
}

__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t i) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
    const unsigned short bits = static_cast<const unsigned short*>(data)[i];
    if (dtype == DType::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t i, float value) {
    switch (dtype) {
        case DType::kBFloat16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value); break;
        case DType::kFloat16: static_cast<__half*>(data)[i] = __float2half_rn(value); break;
        default: static_cast<float*>(data)[i] = value;
    }
}

__device__ __forceinline__ void unpack_quad(const uint4& bits, float* values, const float* type) {
    unpack(bits, *reinterpret_cast<float (*)[kQuad]>(values), type);
}

template <typename T>
__device__ __forceinline__ void unpack_quad(const uint2& bits, float* values, const T* type) {
    const float2 low = to_float2(bits.x, type), high = to_float2(bits.y, type);
    values[0] = low.x;
    values[1] = low.y;
    values[2] = high.x;
    values[3] = high.y;
}

// The kValues of a lane; past the end of the row the last quad again.
template <int kLanes, int kValues, typename Bits, typename T>
__device__ __forceinline__ void load_row_of(const T* row, int num_experts, int lane, float (&values)[kValues]) {
    const int past = (num_experts - 1) / kQuad - lane;  // quads to the last
    const auto* quads = reinterpret_cast<const Bits*>(row) + lane;
    Bits bits[kValues / kQuad];
    if (num_experts == kLanes * kValues) {  // with constant offsets
#pragma unroll
        for (int c = 0; c < kValues / kQuad; ++c) bits[c] = quads[c * kLanes];
    } else {
#pragma unroll
        for (int c = 0; c < kValues / kQuad; ++c) bits[c] = quads[min(c * kLanes, past)];
    }
#pragma unroll
    for (int c = 0; c < kValues / kQuad; ++c) unpack_quad(bits[c], values + c * kQuad, row);
}

// The type is the same for the whole grid: a branch is cheaper than three times as many kernels.
template <int kLanes, int kValues>
__device__ __forceinline__ void load_row(const void* data, DType dtype, int64_t first, int num_experts, int lane,
                                         float (&values)[kValues]) {
    switch (dtype) {
        case DType::kBFloat16:
            return load_row_of<kLanes, kValues, uint2>(static_cast<const __nv_bfloat16*>(data) + first, num_experts,
                                                       lane, values);
        case DType::kFloat16:
            return load_row_of<kLanes, kValues, uint2>(static_cast<const __half*>(data) + first, num_experts, lane,
                                                       values);
        default:
            return load_row_of<kLanes, kValues, uint4>(static_cast<const float*>(data) + first, num_experts, lane,
                                                       values);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Teams

template <int kLanes>
__device__ __forceinline__ float team_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

template <int kLanes>
__device__ __forceinline__ float team_max(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores

// As a computation in that type would hand it on.
__device__ __forceinline__ float rounded(float x, DType step) {
    switch (step) {
        case DType::kBFloat16: return __bfloat162float(__float2bfloat16_rn(x));
        case DType::kFloat16: return __half2float(__float2half_rn(x));
        default: return x;
    }
}

// One branch for all.
template <int kValues>
__device__ __forceinline__ void round_all(float (&x)[kValues], DType step) {
    if (step == DType::kBFloat16) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) x[j] = __bfloat162float(__float2bfloat16_rn(x[j]));
    } else if (step == DType::kFloat16) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) x[j] = __half2float(__float2half_rn(x[j]));
    }
}

// tanh, and its derivative, without the cancellation of 1 - tanh^2.
__device__ __forceinline__ float tanh_of(float x, float& slope) {
    const float e = power_of_two(-2.88539008f * fabsf(x));
    const float inverse = __fdividef(1.0f, 1.0f + e);
    slope = 4.0f * e * inverse * inverse;
    const float xx = x * x;
    const float near = x * (1.0f - xx * (0.3333333333f - xx * (0.1333333333f - xx * 0.0539682540f)));
    const float value = fabsf(x) < 0.2f ? near : copysignf((1.0f - e) * inverse, x);
    return x == x ? value : x;
}

__device__ __forceinline__ float capped(float z, float soft_cap) {
    float slope;
    return soft_cap > 0.0f ? tanh_of(z * __frcp_rn(soft_cap), slope) * soft_cap : z;
}

__device__ __forceinline__ float cap_slope(float z, float soft_cap) {
    if (!(soft_cap > 0.0f)) return 1.0f;
    float slope;
    tanh_of(z * __frcp_rn(soft_cap), slope);
    return slope;
}

// exp(x) for x <= 0, without denormal results.
__device__ __forceinline__ float fast_exp(float x) { return power_of_two(1.44269504f * x); }

__device__ __forceinline__ float softplus(float z) { return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))); }

__device__ __forceinline__ float sqrt_softplus(float z, DType step) {
    return z == z ? sqrtf(rounded(softplus(z), step)) : z;
}

// Those of all experts, to choose by: log(1 + u) = 2 atanh(u / (2 + u)), whose series ends at 2^-26 for u <= 1.
__device__ __forceinline__ float fast_softplus(float z) {
    const float u = fast_exp(-fabsf(z));
    const float s = __fdividef(u, 2.0f + u), ss = s * s;
    float series = 1.0f / 15.0f;
#pragma unroll
    for (int n = 13; n > 0; n -= 2) series = fmaf(series, ss, 1.0f / static_cast<float>(n));
    return fmaf(2.0f * s, series, fmaxf(z, 0.0f));
}

__device__ __forceinline__ float fast_sqrt(float x) {
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
}

// Far to the left it is the exponential.
__device__ __forceinline__ float exact_sigmoid(float z) {
    const float e = expf(-fabsf(z)), inverse = __fdividef(1.0f, 1.0f + e);
    return z < 0.0f ? e * inverse : inverse;
}

// The score of one capped logit to a few ulp; `top` and `inverse` are those of the softmax.
__device__ __forceinline__ float score_of(float z, float top, float inverse, Scoring scoring, DType step) {
    float p;
    switch (scoring) {
        case Scoring::kSoftmax: p = expf(z - top) * inverse; break;
        case Scoring::kSigmoid: p = exact_sigmoid(z); break;
        default: p = sqrt_softplus(z, step);
    }
    return rounded(p, step);
}

// What the weights are divided by; `follows` says whether it depends on them.
__device__ __forceinline__ float total_of(float sum, float epsilon, float min_sum, DType step, bool& follows) {
    const float total = rounded(rounded(sum, step) + epsilon, step);
    follows = total >= min_sum;
    return total < min_sum ? min_sum : total;  // NaN stays
}

}  // namespace moe_kernels
