// topk_route_bwd: gradients of the weights -> gradients of the logits, scores computed again.
//
//     d p[k]     = scale d_weights[k], through the renormalisation where there is one            d_weights [T, K]
//     d z[e]     = p (d p - sum over K of d p p) | d p p (1 - p) | d p sigmoid(z) / (2 p)         logits [T, E]
//     d logits   = d z, times 1 - tanh^2 under a cap                                             -> [T, E]
//
// A slot whose index lies outside 0..E-1 has no expert: it is in no sum and gets nothing.
//
// A token belongs to a team of 8 lanes (up to 256 experts) or a whole warp. What the K chosen get is put into a row of
// zeros in shared memory, which the team then writes four elements a lane at a time: one pass over d_logits and no
// scattered stores. Only a softmax before top-k reads the whole row, for its maximum and its sum, and gives every
// expert a gradient; the other scores read the K chosen logits. Sums are in a fixed order.
//
// Bytes are the limit: at T = 16384 an SM has 380 instructions of a warp for a token in 7 µs (see topk_route.cu).

#include "common.cuh"
#include "require.h"
#include "router.cuh"
#include "topk_route_bwd.h"

namespace moe_kernels {
namespace {

constexpr int kThreads = 128;

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

__device__ __forceinline__ void store_quad(void* row, DType dtype, int expert, const float4& x) {
    switch (dtype) {
        case DType::kBFloat16: {
            auto* out = static_cast<__nv_bfloat16*>(row) + expert;
            *reinterpret_cast<uint2*>(out) = make_uint2(from_floats(x.x, x.y, out), from_floats(x.z, x.w, out));
            break;
        }
        case DType::kFloat16: {
            auto* out = static_cast<__half*>(row) + expert;
            *reinterpret_cast<uint2*>(out) = make_uint2(from_floats(x.x, x.y, out), from_floats(x.z, x.w, out));
            break;
        }
        default: *reinterpret_cast<float4*>(static_cast<float*>(row) + expert) = x;
    }
}

__device__ __forceinline__ void* row_of(void* data, DType dtype, int64_t first) {
    return static_cast<char*>(data) + first * (dtype == DType::kFloat32 ? 4 : 2);
}

// The chosen experts, kNone where a slot has none; scores and gradients on their way.
constexpr int kNone = -1;
struct Chosen {
    float z[kMostChosen], score[kMostChosen], d[kMostChosen];
    int expert[kMostChosen];
};

// kDense: a softmax over all experts.
template <int kLanes, int kValues, bool kDense>
__global__ void __launch_bounds__(kThreads) topk_route_bwd_kernel(const RouteBackwardArguments a) {
    constexpr int kTeams = kThreads / kLanes;
    __shared__ Chosen all_chosen[kTeams];
    __shared__ __align__(16) float all_rows[kTeams][kLanes * kValues];

    const RouteRule& rule = a.rule;
    const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kTeams + team;
    const bool exists = token < a.tokens;  // the lanes of a warp stay together
    const int64_t t = exists ? token : a.tokens - 1;
    const int64_t row = t * a.logits_stride;
    Chosen& chosen = all_chosen[team];
    float* d_row = all_rows[team];
    const Scoring scoring = kDense ? Scoring::kSoftmax : rule.scoring;

    float x[kDense ? kValues : kQuad];
    if constexpr (kDense) load_row<kLanes>(a.logits, a.logits_dtype, row, a.num_experts, lane, x);
#pragma unroll 1
    for (int k = lane; k < a.top_k; k += kLanes) {
        const int64_t index = a.indices[t * a.top_k + k];
        const bool is_one = index >= 0 && index < a.num_experts;
        const int expert = is_one ? static_cast<int>(index) : kNone;
        chosen.expert[k] = expert;
        chosen.d[k] = load_element(a.d_weights, a.d_weights_dtype, t * a.top_k + k) * rule.scale;
        chosen.z[k] = load_element(a.logits, a.logits_dtype, row + max(expert, 0));  // of none nobody looks at it
    }
#pragma unroll
    for (int c = 0; c < kValues / kQuad; ++c) {
        const int expert = (c * kLanes + lane) * kQuad;
        if (expert < a.num_experts) *reinterpret_cast<float4*>(d_row + expert) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    // The softmax: over the row, or over the chosen.
    float top = -INFINITY, total = 0.0f;
    if constexpr (kDense) {
        if (rule.soft_cap > 0.0f) {
#pragma unroll
            for (int j = 0; j < kValues; ++j) x[j] = capped(x[j], rule.soft_cap);
        }
        if (a.num_experts < kLanes * kValues) {
#pragma unroll
            for (int j = 0; j < kValues; ++j) x[j] = expert_of<kLanes>(j, lane) < a.num_experts ? x[j] : -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < kValues; ++j) top = fmaxf(top, x[j]);
        top = team_max<kLanes>(top);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
            x[j] = fast_exp(x[j] - top);
            total += x[j];
        }
        total = team_sum<kLanes>(total);
    } else if (scoring == Scoring::kSoftmax) {
#pragma unroll 1
        for (int k = lane; k < a.top_k; k += kLanes) {
            if (chosen.expert[k] != kNone) top = fmaxf(top, capped(chosen.z[k], rule.soft_cap));
        }
        top = team_max<kLanes>(top);
#pragma unroll 1
        for (int k = lane; k < a.top_k; k += kLanes) {
            if (chosen.expert[k] != kNone) total += expf(capped(chosen.z[k], rule.soft_cap) - top);
        }
        total = team_sum<kLanes>(total);
    }

    const float inverse = 1.0f / total;  // of a softmax

    // From the weights back to the scores: each weight pulls on the sum of them all.
    float sum = 0.0f, pull = 0.0f;
#pragma unroll 1
    for (int k = lane; k < a.top_k; k += kLanes) {
        if (chosen.expert[k] == kNone) continue;
        const float p = score_of(capped(chosen.z[k], rule.soft_cap), top, inverse, scoring, rule.step);
        chosen.score[k] = p;
        sum += p;
        pull += chosen.d[k] * p;
    }
    float divisor = 1.0f, of_sum = 0.0f;
    if (rule.renormalize) {
        bool follows;
        divisor = total_of(team_sum<kLanes>(sum), rule.epsilon, rule.min_sum, rule.step, follows);
        pull = team_sum<kLanes>(pull) / divisor;
        of_sum = follows ? pull : 0.0f;
    }
    // And, of a softmax, on the sum of the exponentials.
    pull = 0.0f;
    if (scoring == Scoring::kSoftmax) {
#pragma unroll 1
        for (int k = lane; k < a.top_k; k += kLanes) {
            if (chosen.expert[k] != kNone) pull += (chosen.d[k] - of_sum) / divisor * chosen.score[k];
        }
        pull = team_sum<kLanes>(pull);
    }
    __syncwarp();  // the zeros are written
#pragma unroll 1
    for (int k = lane; k < a.top_k; k += kLanes) {
        const int expert = chosen.expert[k];
        if (expert == kNone) continue;
        const float p = chosen.score[k];
        float d = (chosen.d[k] - of_sum) / divisor;
        if constexpr (!kDense) {
            if (scoring == Scoring::kSoftmax) {
                d = p * (d - pull);
            } else if (scoring == Scoring::kSigmoid) {
                d = d * p * (1.0f - p);
            } else {
                // Far to the left the score underflows and its derivative, half the score there, with it.
                const float z = capped(chosen.z[k], rule.soft_cap);
                d = p > 0.0f ? d * exact_sigmoid(z) / (2.0f * p) : p;
            }
            d *= cap_slope(chosen.z[k], rule.soft_cap);
        }
        d_row[expert] = d;
    }
    __syncwarp();

    void* out = row_of(a.d_logits, a.logits_dtype, t * a.d_logits_stride);
#pragma unroll
    for (int c = 0; c < kValues / kQuad; ++c) {
        const int expert = (c * kLanes + lane) * kQuad;
        if (!exists || expert >= a.num_experts) continue;
        float4 d = *reinterpret_cast<const float4*>(d_row + expert);
        if constexpr (kDense) {
            float* of[kQuad] = {&d.x, &d.y, &d.z, &d.w};
#pragma unroll
            for (int v = 0; v < kQuad; ++v) {
                const float p = rounded(x[c * kQuad + v] * inverse, rule.step);
                *of[v] = p * (*of[v] - pull);
            }
            if (rule.soft_cap > 0.0f) {  // the slope is that of the logits, which are in L1
#pragma unroll
                for (int v = 0; v < kQuad; ++v) {
                    const int e = min(expert + v, a.num_experts - 1);
                    *of[v] *= cap_slope(load_element(a.logits, a.logits_dtype, row + e), rule.soft_cap);
                }
            }
        }
        store_quad(out, a.logits_dtype, expert, d);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <int kLanes, int kValues>
void launch(const RouteBackwardArguments& a, cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(ceil_div(a.tokens, kThreads / kLanes));
    if (a.rule.scoring == Scoring::kSoftmax && !a.rule.after) {
        topk_route_bwd_kernel<kLanes, kValues, true><<<grid, kThreads, 0, stream>>>(a);
    } else {
        topk_route_bwd_kernel<kLanes, kValues, false><<<grid, kThreads, 0, stream>>>(a);
    }
    check_launch("topk_route_bwd_kernel");
}

}  // namespace

void topk_route_bwd(const RouteBackwardArguments& a, cudaStream_t stream) {
    if (a.tokens == 0) return;
    const Needs needs{"topk_route_bwd"};
    require(a.num_experts >= 1 && a.num_experts <= kMostExperts, "topk_route_bwd: num_experts must be from 1 to ",
            kMostExperts, ", got ", a.num_experts);
    require(a.top_k >= 1 && a.top_k <= kMostChosen, "topk_route_bwd: top_k must be from 1 to ", kMostChosen, ", got ",
            a.top_k);
    require_rule(needs, a.rule);
    needs.dtype("logits_dtype", a.logits_dtype);
    needs.dtype("d_weights_dtype", a.d_weights_dtype);
    const int element_bytes = a.logits_dtype == DType::kFloat32 ? 4 : 2;
    needs.present("d_weights", a.d_weights);
    needs.present("indices", a.indices);
    needs.quads("logits", a.logits, a.logits_stride, a.tokens, element_bytes);
    needs.quads("d_logits", a.d_logits, a.d_logits_stride, a.tokens, element_bytes);
    if (a.num_experts <= 128) return launch<8, 16>(a, stream);
    if (a.num_experts <= 256) return launch<8, 32>(a, stream);
    if (a.num_experts <= 512) return launch<32, 16>(a, stream);
    return launch<32, 32>(a, stream);
}

}  // namespace moe_kernels
