// Order within a team of lanes, for topk_route: a sort, a threshold by the maxima of sets, and K maxima over a row.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.cuh"
#include "router.cuh"

namespace moe_kernels {

// Integers that order as the floats do, -0 like 0.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The next lower float; of -inf and NaN nothing that is used.
__device__ __forceinline__ float next_below(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    if (bits == 0) return __uint_as_float(0x80000001u);
    return __uint_as_float(bits >> 31 ? bits + 1 : bits - 1);
}

template <typename T>
__device__ __forceinline__ T greater_of(T a, T b) {
    if constexpr (std::is_same_v<T, float>) {
        return fmaxf(a, b);
    } else {
        return max(a, b);
    }
}

template <typename T>
__device__ __forceinline__ T lesser_of(T a, T b) {
    if constexpr (std::is_same_v<T, float>) {
        return fminf(a, b);
    } else {
        return min(a, b);
    }
}

// Descending: element r * kLanes + lane of the team is x[r] of that lane. The first step of a merge pairs the ends of
// two descending runs, so that in every step the lane's own bit says which of a pair stays.
template <int kLanes, int kRegisters, typename T>
__device__ __forceinline__ void sort(T (&x)[kRegisters], int lane) {
    const auto across = [&](int other, int bit) {
        const bool upper = (lane & bit) != 0;
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
            const T theirs = __shfl_xor_sync(kFullWarp, x[r], other);
            x[r] = upper ? lesser_of(x[r], theirs) : greater_of(x[r], theirs);
        }
    };
#pragma unroll
    for (int run = 2; run <= kLanes; run *= 2) {
        across(run - 1, run / 2);
#pragma unroll
        for (int step = run / 4; step > 0; step /= 2) across(step, step);
    }
#pragma unroll
    for (int run = 2; run <= kRegisters; run *= 2) {
#pragma unroll
        for (int first = 0; first < kRegisters; first += run) {
#pragma unroll
            for (int i = 0; i < run / 2; ++i) {
                T &high = x[first + i], &low = x[first + run - 1 - i];
                const T mirrored_low = __shfl_xor_sync(kFullWarp, low, kLanes - 1);
                const T mirrored_high = __shfl_xor_sync(kFullWarp, high, kLanes - 1);
                high = greater_of(high, mirrored_low);
                low = lesser_of(low, mirrored_high);
            }
        }
#pragma unroll
        for (int step = run / 4; step > 0; step /= 2) {
#pragma unroll
            for (int r = 0; r < kRegisters; ++r) {
                if ((r & step) == 0) {
                    const T high = greater_of(x[r], x[r + step]);
                    x[r + step] = lesser_of(x[r], x[r + step]);
                    x[r] = high;
                }
            }
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) across(step, step);
    }
}

// A value that at least K of the team's choices are not below; -inf where there are too few.
template <int kLanes, int kValues>
__device__ __forceinline__ float threshold(const float (&choices)[kValues], int top_k, int lane) {
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < kValues / 2; ++j) {
        best[0] = fmaxf(best[0], choices[j]);
        best[1] = fmaxf(best[1], choices[j + kValues / 2]);
    }
    sort<kLanes>(best, lane);
    return __shfl_sync(kFullWarp, best[0], top_k - 1, kLanes);
}

// K rounds of a maximum over all the row's candidates, for the rows that no list can hold.
template <int kLanes, int kValues>
__device__ __forceinline__ void choose_in_rounds(const float (&choices)[kValues], uint32_t candidates, int top_k,
                                                 int lane, int* chosen) {
    uint32_t keys[kValues];
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
        const float choice = choices[j] == choices[j] ? choices[j] : -INFINITY;
        keys[j] = candidates >> j & 1 ? ordered(choice) : 0;
    }
#pragma unroll 1
    for (int k = 0; k < top_k; ++k) {
        uint32_t best = 0;
        int expert = 0;
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (keys[j] > best) {
                best = keys[j];
                expert = expert_of<kLanes>(j, lane);
            }
        }
        uint64_t winner = static_cast<uint64_t>(best) << 32 | (kMostExperts - expert);
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
            winner = max(winner, __shfl_xor_sync(kFullWarp, winner, step));
        }
        expert = kMostExperts - static_cast<int>(winner & 0xffff);
        if (lane == 0) chosen[k] = expert;
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (expert_of<kLanes>(j, lane) == expert) keys[j] = 0;
        }
    }
}

}  // namespace moe_kernels
