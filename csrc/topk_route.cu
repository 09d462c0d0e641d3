// topk_route: router logits -> the K best experts of every token, best first, and their weights.
//
//     z       = cap tanh(logits / cap)       p = softmax over E | sigmoid | sqrt(softplus) of z      logits [T, E]
//     indices = top K of p + bias, or of the logits where there is no bias                       -> [T, K] int64
//     weights = scale p[indices] / max(sum + epsilon, min_sum)                                   -> [T, K]
//
// A token belongs to a team of 8 lanes (up to 256 experts) or a whole warp (up to 1024), which holds its row in
// registers, 16 or 32 values a lane. No barrier but those of a warp; nothing of the choice depends on other tokens.
//
//  1. Threshold. The maxima of 2 disjoint sets a lane are sorted across the team; the K-th of them is a value that K
//     experts at least are not below, and few more: of random logits 10.6 of 128 or 256 for K = 8, 26 of 512 for K
//     = 22.
//  2. List. Each lane has a bit for each of its values that is not below; a prefix sum over the team gives the places.
//  3. Order. An element of the list becomes a 32-bit key: how far the integer that orders as its choice does is above
//     the threshold's, then the index, reversed. One bitonic sort across the team puts best first and ties by index.
//  4. Weights: a lane of the team for each of the K. The logits are read again, from L1.
//
// That the K-th best of the best of K and more sets bounds the K-th best of all is the idea of Triton's list here too
// (moe_kernels/backends/triton/topk_route.py), which halves an interval to find it.
//
// Exactness: comparisons of floats skip NaN, which is below every threshold but -inf. Where a list has more than kShort
// elements or spans too many floats for 32 bits, its elements count who is before them, by the whole (choice, index),
// up to kMost of them. Where it is longer than that (many ties) or too short, K rounds of a maximum over the row
// decide. These ways are taken by whole warps and give the same answer.
//
// Groups: every four experts leave their best two in shared memory, a lane merges those of a group, all groups are
// ranked by counting.
//
// Budget of an H100, 132 SMs of 4 schedulers at 1.7 GHz: 900 instructions of a warp a nanosecond; at T = 16384 that is
// 380 a token in 7 us and 820 in 15 us. Integers, compares, maxima and selects issue at half that rate, exponentials
// and reciprocals at an eighth. The machine code of sm_90 takes about, a token (a warp has four or one):
//
//     E=128 K=8  softmax, bf16                    160
//     E=256 K=8  sigmoid, bias, 4 of 8 groups     440
//     E=512 K=22 sigmoid, bias                    660
//
// The switches over dtypes are the same for the whole grid. What is read element by element is in loops that are not
// unrolled: the compiler would copy each for every combination of the types.

#include "common.cuh"
#include "require.h"
#include "router.cuh"
#include "router_groups.cuh"
#include "router_order.cuh"
#include "topk_route.h"

namespace moe_kernels {
namespace {

constexpr int kThreads = 128;

// What has to be computed of every expert.
enum class Row { kLogits, kSoftmax, kSigmoid, kSqrtSoftplus };

// ---------------------------------------------------------------------------------------------------------------------
// Choices

struct Softmax {
    float top, inverse;  // of the sum
};

template <Row kRow>
__device__ __forceinline__ float row_score(float z, const Softmax& softmax) {
    if constexpr (kRow == Row::kSoftmax) return fast_exp(z - softmax.top) * softmax.inverse;
    if constexpr (kRow == Row::kSigmoid) return sigmoid(z);
    if constexpr (kRow == Row::kSqrtSoftplus) return fast_softplus(z);  // before the root
    return z;
}

// The score that chooses, before the bias. Twice computed, for the row and for the list, it is the same number.
template <Row kRow>
__device__ __forceinline__ float choice_score(float z, const Softmax& softmax, const RouteRule& rule) {
    float p = row_score<kRow>(capped(z, rule.soft_cap), softmax);
    if constexpr (kRow == Row::kSqrtSoftplus) p = fast_sqrt(rounded(p, rule.step));
    return kRow == Row::kLogits ? p : rounded(p, rule.step);
}

__device__ __forceinline__ float plus_bias(float score, float bias, DType step) {
    return rounded(__fadd_rn(score, bias), step);  // never part of a multiply-add
}

// Of the values whose bit is set; the others are -inf.
template <int kLanes, int kValues>
__device__ __forceinline__ Softmax softmax_of(const float (&x)[kValues], uint32_t candidates, float soft_cap) {
    Softmax softmax;
    softmax.top = -INFINITY;
    float total = 0.0f;
    const auto reduce = [&](auto z) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) softmax.top = fmaxf(softmax.top, z(j));
        softmax.top = team_max<kLanes>(softmax.top);
#pragma unroll
        for (int j = 0; j < kValues; ++j) total += fast_exp(z(j) - softmax.top);
    };
    if (soft_cap > 0.0f) {
        reduce([&](int j) { return candidates >> j & 1 ? capped(x[j], soft_cap) : -INFINITY; });
    } else {
        reduce([&](int j) { return x[j]; });
    }
    softmax.inverse = 1.0f / team_sum<kLanes>(total);
    return softmax;
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

template <int kLanes>
struct Places {
    static constexpr int kRegisters = kLanes == kWarpSize ? 1 : 2;  // of a sort by 32-bit keys
    static constexpr int kShort = kRegisters * kLanes;
    static constexpr int kMost = 2 * kShort;  // of a list

    uint64_t keys[kMost];
    uint32_t packed[kMost];
    int list[kMost];
    int chosen[kLanes];
};

// kGeneral: also groups, a soft cap and rounded scores.
template <int kLanes, int kValues, Row kRow, bool kGeneral>
__global__ void __launch_bounds__(kThreads) topk_route_kernel(const RouteArguments a) {
    using P = Places<kLanes>;
    constexpr int kWidth = kLanes * kValues;
    constexpr uint32_t kAll = kValues == 32 ? 0xffffffffu : (1u << (kValues & 31)) - 1;
    constexpr int kIndexBits = kWidth == 128 ? 7 : kWidth == 256 ? 8 : kWidth == 512 ? 9 : 10;
    __shared__ P all_places[kThreads / kLanes];
    extern __shared__ float2 all_items[];

    RouteRule rule = a.rule;
    DType step_choice = a.step_choice;
    if constexpr (!kGeneral) {
        rule.soft_cap = 0.0f;
        rule.step = step_choice = DType::kFloat32;
    }
    const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + team;
    const bool exists = token < a.tokens;  // the lanes of a warp stay together
    const int64_t row = (exists ? token : a.tokens - 1) * a.logits_stride;
    P& places = all_places[team];

    // 1. The row, what chooses, and who may be chosen.
    float choices[kValues];
    load_row<kLanes>(a.logits, a.logits_dtype, row, a.num_experts, lane, choices);
    uint32_t candidates = kAll;
    const bool full = a.num_experts == kWidth;
    if (!full) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (expert_of<kLanes>(j, lane) >= a.num_experts) {
                choices[j] = -INFINITY;  // for the softmax
                candidates &= ~(1u << j);
            }
        }
    }
    Softmax softmax{};
    if constexpr (kRow == Row::kSoftmax) softmax = softmax_of<kLanes>(choices, candidates, rule.soft_cap);
    const bool biased = a.bias != nullptr;
    const auto to_scores = [&](float (&scores)[kValues]) {
        if (rule.soft_cap > 0.0f) {
#pragma unroll
            for (int j = 0; j < kValues; ++j) scores[j] = capped(scores[j], rule.soft_cap);
        }
#pragma unroll
        for (int j = 0; j < kValues; ++j) scores[j] = row_score<kRow>(scores[j], softmax);
        if constexpr (kRow == Row::kSqrtSoftplus) {
            round_all(scores, rule.step);
#pragma unroll
            for (int j = 0; j < kValues; ++j) scores[j] = fast_sqrt(scores[j]);
        }
        if constexpr (kRow != Row::kLogits) round_all(scores, rule.step);
        if (!biased) return;
        float bias[kValues];
        load_row<kLanes>(a.bias, a.bias_dtype, 0, a.num_experts, lane, bias);
#pragma unroll
        for (int j = 0; j < kValues; ++j) scores[j] = __fadd_rn(scores[j], bias[j]);
        round_all(scores, step_choice);
    };
    const bool grouped = kGeneral && a.num_groups > 1, zeros = grouped && biased && a.losers_zero;
    const int* of_group = nullptr;  // whether a group is kept
    if (kGeneral && grouped) {
        to_scores(choices);
        if (!full) {
#pragma unroll
            for (int j = 0; j < kValues; ++j) choices[j] = candidates >> j & 1 ? choices[j] : NAN;
        }
        const GroupLayout layout = GroupLayout::of(a.num_experts, a.num_groups);
        float2* items = all_items + team * layout.words / 2;
        int* flags = reinterpret_cast<int*>(items + a.num_groups * layout.stride);
        of_group = flags;
        const uint32_t kept = in_best_groups<kLanes>(choices, a, lane, layout, items, flags);
        if (!zeros) candidates &= kept;
        if (!biased) load_row<kLanes>(a.logits, a.logits_dtype, row, a.num_experts, lane, choices);  // from L1
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            if (!(kept >> j & 1)) choices[j] = zeros ? 0.0f : NAN;
        }
    } else if (biased) {
        to_scores(choices);
    }
    if (!full) {
#pragma unroll
        for (int j = 0; j < kValues; ++j) choices[j] = candidates >> j & 1 ? choices[j] : NAN;
    }

    // 2. Those that are not below the threshold.
    const float least = threshold<kLanes>(choices, a.top_k, lane);
    const float below = next_below(least);
    uint32_t bits = 0;
#pragma unroll
    for (int j = kValues - 1; j >= 0; --j) {
        bits = __funnelshift_l(__float_as_uint(below - choices[j]), bits, 1);  // its sign; that of NaN is 0
    }
    if (least == -INFINITY) bits = candidates;  // NaN too
    int end = __popc(bits);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
        const int before = __shfl_up_sync(kFullWarp, end, step, kLanes);
        if (lane >= step) end += before;
    }
    const int length = __shfl_sync(kFullWarp, end, kLanes - 1, kLanes);
    const bool chooses = lane < a.top_k;  // the lane has the expert of that rank
    int expert = 0;
    if (__all_sync(kFullWarp, length >= a.top_k && length <= P::kMost)) {
        while (bits != 0) {
            const int j = 31 - __clz(bits);
            bits ^= 1u << j;
            places.list[--end] = expert_of<kLanes>(j, lane);
        }
        __syncwarp();

        // 3. Best first, ties by index.
        const uint32_t base = ordered(least);
        const int unused = !biased && a.logits_dtype != DType::kFloat32 ? 13 : 0;  // bits of what was a 16-bit float
        bool fits = length <= P::kShort;
#pragma unroll 1
        for (int i = lane; i < length; i += kLanes) {
            const int e = places.list[i];
            float choice = load_element(a.logits, a.logits_dtype, row + e);
            if (biased) {
                const float score = choice_score<kRow>(choice, softmax, rule);
                choice = plus_bias(score, load_element(a.bias, a.bias_dtype, e), step_choice);
                if (zeros && !of_group[e / (a.num_experts / a.num_groups)]) choice = 0.0f;
            }
            choice = choice == choice ? choice : -INFINITY;
            const uint32_t key = ordered(choice), above = (key - base) >> unused;
            fits = fits && above < 1u << (32 - kIndexBits);
            places.packed[i] = above << kIndexBits | (kWidth - 1 - e);
            places.keys[i] = static_cast<uint64_t>(key) << 32 | (kMostExperts - e);
        }
        if (__all_sync(kFullWarp, fits)) {
            uint32_t keys[P::kRegisters];
#pragma unroll
            for (int r = 0; r < P::kRegisters; ++r) {
                const int i = r * kLanes + lane;  // this lane wrote it
                keys[r] = i < length ? places.packed[i] : 0;
            }
            sort<kLanes>(keys, lane);
            expert = kWidth - 1 - static_cast<int>(keys[0] & (kWidth - 1));
        } else {
            __syncwarp();
#pragma unroll 1
            for (int i = lane; i < length; i += kLanes) {
                const uint64_t mine = places.keys[i];
                int rank = 0;
#pragma unroll 4
                for (int other = 0; other < length; ++other) rank += places.keys[other] > mine;
                if (rank < a.top_k) places.chosen[rank] = places.list[i];
            }
            __syncwarp();
            if (chooses) expert = places.chosen[lane];
        }
    } else {
        choose_in_rounds<kLanes>(choices, candidates, a.top_k, lane, places.chosen);
        __syncwarp();
        if (chooses) expert = places.chosen[lane];
    }

    // 4. What they weigh.
    const Scoring scoring = kRow == Row::kLogits    ? rule.scoring
                            : kRow == Row::kSoftmax ? Scoring::kSoftmax
                            : kRow == Row::kSigmoid ? Scoring::kSigmoid
                                                    : Scoring::kSqrtSoftplus;
    float z = -INFINITY, p = 0.0f;
    if (chooses) z = capped(load_element(a.logits, a.logits_dtype, row + expert), rule.soft_cap);
    if (kRow == Row::kLogits && scoring == Scoring::kSoftmax) {
        softmax.top = team_max<kLanes>(z);
        softmax.inverse = 1.0f / team_sum<kLanes>(chooses ? expf(z - softmax.top) : 0.0f);
    }
    if (chooses) p = score_of(z, softmax.top, softmax.inverse, scoring, rule.step);
    if (rule.renormalize) {
        bool follows;
        p = rounded(p / total_of(team_sum<kLanes>(p), rule.epsilon, rule.min_sum, rule.step, follows), rule.step);
    }
    if (exists && chooses) {
        const int64_t i = token * a.top_k + lane;
        store_element(a.weights, a.weights_dtype, i, rounded(p * rule.scale, rule.step));
        a.indices[i] = expert;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <int kLanes, int kValues, Row kRow, bool kGeneral>
void launch(const RouteArguments& a, cudaStream_t stream) {
    constexpr int kTeams = kThreads / kLanes;
    const auto grid = static_cast<unsigned>(ceil_div(a.tokens, kTeams));
    const int bytes =
        kGeneral && a.num_groups > 1 ? kTeams * GroupLayout::of(a.num_experts, a.num_groups).words * 4 : 0;
    topk_route_kernel<kLanes, kValues, kRow, kGeneral><<<grid, kThreads, bytes, stream>>>(a);
    check_launch("topk_route_kernel");
}

template <Row kRow>
void launch_size(const RouteArguments& a, cudaStream_t stream) {
    const bool rounds = a.rule.step != DType::kFloat32 || a.step_choice != DType::kFloat32;
    const bool few = a.top_k <= 8;  // a lane of the team for each
    const bool general = a.num_groups > 1 || a.rule.soft_cap > 0.0f || rounds || a.num_experts > 512;
    if constexpr (kRow != Row::kSqrtSoftplus) {
        if (!general && few && a.num_experts <= 128) return launch<8, 16, kRow, false>(a, stream);
        if (!general && few && a.num_experts <= 256) return launch<8, 32, kRow, false>(a, stream);
        if (!general) return launch<32, 16, kRow, false>(a, stream);
    }
    if (few && a.num_experts <= 256) return launch<8, 32, kRow, true>(a, stream);
    return launch<32, 32, kRow, true>(a, stream);
}

}  // namespace

void topk_route(const RouteArguments& a, cudaStream_t stream) {
    if (a.tokens == 0) return;
    const Needs needs{"topk_route"};
    require(a.num_experts >= 1 && a.num_experts <= kMostExperts, "topk_route: num_experts must be from 1 to ",
            kMostExperts, ", got ", a.num_experts);
    require(a.top_k >= 1 && a.top_k <= kMostChosen && a.top_k <= a.num_experts, "topk_route: top_k must be from 1 to ",
            kMostChosen, " and at most num_experts, got ", a.top_k);
    require(a.num_groups >= 1 && a.num_experts % a.num_groups == 0, "topk_route: num_groups must divide num_experts");
    require(a.top_groups >= 1 && a.top_groups <= a.num_groups,
            "topk_route: top_groups must be from 1 to num_groups, got ", a.top_groups);
    require_rule(needs, a.rule);
    needs.dtype("step_choice", a.step_choice);
    needs.present("weights", a.weights);
    needs.dtype("weights_dtype", a.weights_dtype);
    needs.present("indices", a.indices);
    needs.dtype("logits_dtype", a.logits_dtype);
    needs.quads("logits", a.logits, a.logits_stride, a.tokens, a.logits_dtype == DType::kFloat32 ? 4 : 2);
    if (a.bias != nullptr) {
        needs.dtype("bias_dtype", a.bias_dtype);
        needs.quads("bias", a.bias, 0, 1, a.bias_dtype == DType::kFloat32 ? 4 : 2);
    }
    const bool scores_choose = a.bias != nullptr || a.num_groups > 1;
    if (a.rule.after) return launch_size<Row::kLogits>(a, stream);
    if (a.rule.scoring == Scoring::kSoftmax) return launch_size<Row::kSoftmax>(a, stream);
    if (!scores_choose) return launch_size<Row::kLogits>(a, stream);
    if (a.rule.scoring == Scoring::kSigmoid) return launch_size<Row::kSigmoid>(a, stream);
    return launch_size<Row::kSqrtSoftplus>(a, stream);
}

}  // namespace moe_kernels
