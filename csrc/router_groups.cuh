// The groups of experts that topk_route keeps.
#pragma once

#include <cmath>

#include "common.cuh"
#include "router.cuh"

namespace moe_kernels {

// Where the groups' best lie. An item is what four experts left, or one expert where a group is no multiple of four.
struct GroupLayout {
    int items;       // of a group
    int stride;      // odd, so that lanes read different banks
    int reciprocal;  // of `items`, times 2^20: exact for up to 1024 items
    int words;       // of shared memory a team

    __host__ __device__ static GroupLayout of(int num_experts, int num_groups) {
        const int members = num_experts / num_groups;
        GroupLayout layout;
        layout.items = members % kQuad == 0 ? members / kQuad : members;
        layout.stride = layout.items | 1;
        layout.reciprocal = ((1 << 20) + layout.items - 1) / layout.items;
        layout.words = 2 * num_groups * (layout.stride + 1);
        return layout;
    }
};

// The best two of some choices; NaN counts as -inf.
struct BestTwo {
    float first = -INFINITY, second = -INFINITY;

    __device__ __forceinline__ void add(const BestTwo& other) {
        second = fmaxf(fminf(first, other.first), fmaxf(second, other.second));
        first = fmaxf(first, other.first);
    }
};

__device__ __forceinline__ BestTwo best_two(float a, float b) {
    BestTwo best;
    best.first = fmaxf(a, b);  // of a NaN and a number the number
    best.second = a == a && b == b ? fminf(a, b) : -INFINITY;
    best.first = fmaxf(best.first, -INFINITY);
    return best;
}

// A bit for each value of the lane: whether its group is one of the best. kept[g] says the same.
template <int kLanes, int kValues>
__device__ __forceinline__ uint32_t in_best_groups(const float (&choices)[kValues], const RouteArguments& a, int lane,
                                                   const GroupLayout& layout, float2* items, int* kept) {
    const bool quads = layout.items * a.num_groups != a.num_experts;
    const auto group_of = [&](int item) { return item * layout.reciprocal >> 20; };
    const auto place_of = [&](int item) { return item + group_of(item) * (layout.stride - layout.items); };
    const int num_items = layout.items * a.num_groups;
    float* merits = reinterpret_cast<float*>(kept + a.num_groups);

    if (quads) {
#pragma unroll
        for (int c = 0; c < kValues / kQuad; ++c) {
            BestTwo best = best_two(choices[kQuad * c], choices[kQuad * c + 1]);
            best.add(best_two(choices[kQuad * c + 2], choices[kQuad * c + 3]));
            const int item = c * kLanes + lane;
            if (item < num_items) items[place_of(item)] = make_float2(best.first, best.second);
        }
    } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            const int item = expert_of<kLanes>(j, lane);
            if (item < num_items) items[place_of(item)] = make_float2(fmaxf(choices[j], -INFINITY), -INFINITY);
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int g = lane; g < a.num_groups; g += kLanes) {
        BestTwo best;
#pragma unroll 4
        for (int i = 0; i < layout.items; ++i) {
            const float2 item = items[g * layout.stride + i];
            BestTwo other;
            other.first = item.x;
            other.second = item.y;
            best.add(other);
        }
        const float merit = a.group_max ? best.first : rounded(best.first + best.second, a.step_choice);
        merits[g] = fmaxf(merit, -INFINITY);
    }
    __syncwarp();
#pragma unroll 1
    for (int g = lane; g < a.num_groups; g += kLanes) {
        const float merit = merits[g];
        int better = 0;
#pragma unroll 4
        for (int i = 0; i < a.num_groups; ++i) better += merits[i] > merit || (merits[i] == merit && i < g);
        kept[g] = better < a.top_groups;
    }
    __syncwarp();
    uint32_t bits = 0;
    if (quads) {
#pragma unroll
        for (int c = 0; c < kValues / kQuad; ++c) {
            const int item = min(c * kLanes + lane, num_items - 1);
            bits |= kept[group_of(item)] ? 0xfu << (kQuad * c) : 0;
        }
    } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            const int item = min(expert_of<kLanes>(j, lane), num_items - 1);
            bits |= kept[group_of(item)] ? 1u << j : 0;
        }
    }
    return bits;
}

}  // namespace moe_kernels
