// The Python module moe_kernels._C. It knows nothing of torch: tensors arrive as device pointers, sizes and strides,
// streams as handles, so one build serves every torch version. Importing it touches no driver and no GPU.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "activation.h"
#include "combine.h"
#include "d_activation.h"
#include "decode_experts.h"
#include "dtype.h"
#include "gate_up.h"
#include "grouped_gemm.h"
#include "grouped_wgrad.h"
#include "permute.h"
#include "plan.h"
#include "routing_plan.h"
#include "row_sums.h"
#include "tile.h"
#include "topk_route.h"
#include "topk_route_bwd.h"
#include "weights.h"

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
    m.def("routing_plan_workspace", &routing_plan_workspace, py::kw_only(), "num_slots"_a, "num_experts"_a, "num_sms"_a,
          "int32 words of scratch memory that routing_plan needs.");
    m.def(
        "routing_plan",
        [](uintptr_t indices, int index_bytes, int64_t num_slots, int num_experts, int block_m, int64_t num_tiles,
           int num_sms, uintptr_t workspace, uintptr_t offsets, uintptr_t slots, uintptr_t positions, uintptr_t tiles,
           uintptr_t stream) {
            routing_plan(pointer<const void>(indices), index_bytes, num_slots, num_experts, block_m, num_tiles, num_sms,
                         pointer<int>(workspace), pointer<int>(offsets), pointer<int>(slots), pointer<int>(positions),
                         pointer<int>(tiles), stream_of(stream));
        },
        py::kw_only(), "indices"_a, "index_bytes"_a, "num_slots"_a, "num_experts"_a, "block_m"_a, "num_tiles"_a,
        "num_sms"_a, "workspace"_a, "offsets"_a, "slots"_a, "positions"_a, "tiles"_a, "stream"_a);
}

void bind_topk_route(py::module_& m) {
    m.attr("SCORINGS") =
        py::dict("softmax"_a = static_cast<int>(Scoring::kSoftmax), "sigmoid"_a = static_cast<int>(Scoring::kSigmoid),
                 "sqrtsoftplus"_a = static_cast<int>(Scoring::kSqrtSoftplus));
    py::class_<RouteRule>(m, "RouteRule")
        .def(py::init([](int scoring, bool after, bool renormalize, float epsilon, float scale, float min_sum,
                         float soft_cap, int step) {
                 return RouteRule{static_cast<Scoring>(scoring), after, renormalize, epsilon, scale, min_sum, soft_cap,
                                  static_cast<DType>(step)};
             }),
             py::kw_only(), "scoring"_a, "after"_a, "renormalize"_a, "epsilon"_a, "scale"_a, "min_sum"_a, "soft_cap"_a,
             "step"_a);
    m.def(
        "topk_route",
        [](uintptr_t weights, int weights_dtype, uintptr_t indices, uintptr_t logits, int64_t logits_stride,
           int logits_dtype, uintptr_t bias, int bias_dtype, int64_t tokens, int num_experts, int top_k, int num_groups,
           int top_groups, bool group_max, bool losers_zero, int step_choice, const RouteRule& rule, uintptr_t stream) {
            RouteArguments a{};
            a.weights = pointer<void>(weights);
            a.indices = pointer<int64_t>(indices);
            a.logits = pointer<const void>(logits);
            a.bias = pointer<const void>(bias);
            a.logits_stride = logits_stride;
            a.tokens = tokens;
            a.num_experts = num_experts;
            a.top_k = top_k;
            a.num_groups = num_groups;
            a.top_groups = top_groups;
            a.group_max = group_max;
            a.losers_zero = losers_zero;
            a.logits_dtype = static_cast<DType>(logits_dtype);
            a.bias_dtype = static_cast<DType>(bias_dtype);
            a.weights_dtype = static_cast<DType>(weights_dtype);
            a.step_choice = static_cast<DType>(step_choice);
            a.rule = rule;
            topk_route(a, stream_of(stream));
        },
        py::kw_only(), "weights"_a, "weights_dtype"_a, "indices"_a, "logits"_a, "logits_stride"_a, "logits_dtype"_a,
        "bias"_a, "bias_dtype"_a, "tokens"_a, "num_experts"_a, "top_k"_a, "num_groups"_a, "top_groups"_a, "group_max"_a,
        "losers_zero"_a, "step_choice"_a, "rule"_a, "stream"_a);
    m.def(
        "topk_route_bwd",
        [](uintptr_t d_logits, int64_t d_logits_stride, uintptr_t d_weights, int d_weights_dtype, uintptr_t logits,
           int64_t logits_stride, int logits_dtype, uintptr_t indices, int64_t tokens, int num_experts, int top_k,
           const RouteRule& rule, uintptr_t stream) {
            RouteBackwardArguments a{};
            a.d_logits = pointer<void>(d_logits);
            a.d_weights = pointer<const void>(d_weights);
            a.logits = pointer<const void>(logits);
            a.indices = pointer<const int64_t>(indices);
            a.d_logits_stride = d_logits_stride;
            a.logits_stride = logits_stride;
            a.tokens = tokens;
            a.num_experts = num_experts;
            a.top_k = top_k;
            a.logits_dtype = static_cast<DType>(logits_dtype);
            a.d_weights_dtype = static_cast<DType>(d_weights_dtype);
            a.rule = rule;
            topk_route_bwd(a, stream_of(stream));
        },
        py::kw_only(), "d_logits"_a, "d_logits_stride"_a, "d_weights"_a, "d_weights_dtype"_a, "logits"_a,
        "logits_stride"_a, "logits_dtype"_a, "indices"_a, "tokens"_a, "num_experts"_a, "top_k"_a, "rule"_a, "stream"_a);
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

void bind_permute(py::module_& m) {
    m.def(
        "permute",
        [](uintptr_t out, uintptr_t x, int64_t x_stride, uintptr_t weights, int weights_dtype, uintptr_t offsets,
           uintptr_t positions, int64_t tokens, int top_k, int width, int num_experts, int dtype, uintptr_t stream) {
            PermuteArguments a{};
            a.out = pointer<void>(out);
            a.x = pointer<const void>(x);
            a.weights = pointer<const void>(weights);
            a.offsets = pointer<const int>(offsets);
            a.positions = pointer<const int>(positions);
            a.x_stride = x_stride;
            a.tokens = tokens;
            a.top_k = top_k;
            a.width = width;
            a.num_experts = num_experts;
            a.dtype = static_cast<DType>(dtype);
            a.weights_dtype = static_cast<DType>(weights_dtype);
            permute(a, stream_of(stream));
        },
        py::kw_only(), "out"_a, "x"_a, "x_stride"_a, "weights"_a, "weights_dtype"_a, "offsets"_a, "positions"_a,
        "tokens"_a, "top_k"_a, "width"_a, "num_experts"_a, "dtype"_a, "stream"_a);
}

void bind_weights(py::module_& m) {
    py::class_<Weights>(m, "Weights")
        .def(py::init([](uintptr_t data, int64_t rows, int64_t columns, int64_t row_stride, int64_t expert_stride) {
                 return Weights{pointer<const void>(data), rows, columns, row_stride, expert_stride};
             }),
             "data"_a, "rows"_a, "columns"_a, "row_stride"_a, "expert_stride"_a);
}

void bind_decode_experts(py::module_& m) {
    py::dict activations;  // name -> (code, has a gate)
    const auto add = [&](const char* name, Activation activation) {
        activations[name] = py::make_tuple(static_cast<int>(activation), is_gated(activation));
    };
    add("swiglu", Activation::kSwiGLU);
    add("geglu", Activation::kGeGLU);
    add("geglu_tanh", Activation::kGeGLUTanh);
    add("swiglu_oai", Activation::kSwiGLUOAI);
    add("swiglu_clamp_before", Activation::kSwiGLUClampBefore);
    add("swiglu_clamp_after", Activation::kSwiGLUClampAfter);
    add("silu", Activation::kSiLU);
    add("gelu", Activation::kGELU);
    add("gelu_tanh", Activation::kGELUTanh);
    add("relu2", Activation::kReLU2);
    m.attr("ACTIVATIONS") = activations;
    m.def(
        "decode_experts",
        [](uintptr_t out, uintptr_t a, uintptr_t y, uintptr_t x, uintptr_t indices, int index_bytes,
           uintptr_t routing_weights, int routing_weights_dtype, const Weights& gate_up, uintptr_t bias_gate_up,
           const Weights& down, uintptr_t bias_down, int tokens, int top_k, int num_experts, int activation,
           float alpha, float limit, bool interleaved, int dtype, int num_sms, uintptr_t stream) {
            DecodeArguments d{};
            d.out = pointer<void>(out);
            d.a = pointer<void>(a);
            d.y = pointer<void>(y);
            d.x = pointer<const void>(x);
            d.indices = pointer<const void>(indices);
            d.routing_weights = pointer<const void>(routing_weights);
            d.gate_up = gate_up;
            d.down = down;
            d.bias_gate_up = pointer<const void>(bias_gate_up);
            d.bias_down = pointer<const void>(bias_down);
            d.tokens = tokens;
            d.top_k = top_k;
            d.num_experts = num_experts;
            d.hidden = static_cast<int>(gate_up.columns);
            d.inner = static_cast<int>(down.columns);
            d.index_bytes = index_bytes;
            d.dtype = static_cast<DType>(dtype);
            d.routing_weights_dtype = static_cast<DType>(routing_weights_dtype);
            d.activation = static_cast<Activation>(activation);
            d.alpha = alpha;
            d.limit = limit;
            d.interleaved = interleaved;
            decode_experts(d, num_sms, stream_of(stream));
        },
        py::kw_only(), "out"_a, "a"_a, "y"_a, "x"_a, "indices"_a, "index_bytes"_a, "routing_weights"_a,
        "routing_weights_dtype"_a, "gate_up"_a, "bias_gate_up"_a, "down"_a, "bias_down"_a, "tokens"_a, "top_k"_a,
        "num_experts"_a, "activation"_a, "alpha"_a, "limit"_a, "interleaved"_a, "dtype"_a, "num_sms"_a, "stream"_a);
}

// What the products over an expert's rows know of the routing.
Plan plan_of(uintptr_t offsets, uintptr_t slots, uintptr_t tiles, int num_tiles, int num_experts, int num_rows,
             int top_k) {
    return {pointer<const int>(offsets),
            pointer<const int>(slots),
            pointer<const int>(tiles),
            num_tiles,
            num_experts,
            num_rows,
            top_k};
}

#ifdef MOE_KERNELS_SM90
void bind_sm90(py::module_& m) {
    py::class_<Plan>(m, "Plan").def(py::init(&plan_of), "offsets"_a, "slots"_a, "tiles"_a, "num_tiles"_a,
                                    "num_experts"_a, "num_rows"_a, "top_k"_a);
    m.def(
        "grouped_gemm",
        [](uintptr_t y, uintptr_t a, int64_t a_stride, const Weights& w, bool across, uintptr_t bias,
           int64_t bias_stride, int64_t width, int64_t reduced, const Plan& plan, int num_sms, uintptr_t counter,
           uintptr_t stream) {
            grouped_gemm({pointer<void>(y), pointer<const void>(a), a_stride, w, across, pointer<const void>(bias),
                          bias_stride, width, reduced},
                         plan, {num_sms, pointer<int>(counter), stream_of(stream)});
        },
        py::kw_only(), "y"_a, "a"_a, "a_stride"_a, "w"_a, "across"_a, "bias"_a, "bias_stride"_a, "width"_a, "reduced"_a,
        "plan"_a, "num_sms"_a, "counter"_a, "stream"_a);
    m.def(
        "gate_up",
        [](uintptr_t h, uintptr_t a, uintptr_t x, int64_t x_stride, const Weights& w, bool across, uintptr_t bias,
           int64_t inner, int64_t reduced, int activation, float alpha, float limit, bool interleaved, const Plan& plan,
           int num_sms, uintptr_t counter, uintptr_t stream) {
            gate_up({pointer<void>(h),
                     pointer<void>(a),
                     pointer<const void>(x),
                     x_stride,
                     w,
                     across,
                     pointer<const void>(bias),
                     inner,
                     reduced,
                     {static_cast<Activation>(activation), alpha, limit, interleaved}},
                    plan, {num_sms, pointer<int>(counter), stream_of(stream)});
        },
        py::kw_only(), "h"_a, "a"_a, "x"_a, "x_stride"_a, "w"_a, "across"_a, "bias"_a, "inner"_a, "reduced"_a,
        "activation"_a, "alpha"_a, "limit"_a, "interleaved"_a, "plan"_a, "num_sms"_a, "counter"_a, "stream"_a);
    m.def(
        "d_activation",
        [](uintptr_t dh, uintptr_t a, uintptr_t partial, uintptr_t h, uintptr_t d_out, int64_t d_out_stride,
           const Weights& w, bool along, uintptr_t weights, int weights_dtype, int64_t inner, int64_t reduced,
           int activation, float alpha, float limit, bool interleaved, const Plan& plan, int num_sms, uintptr_t counter,
           uintptr_t stream) {
            d_activation({pointer<void>(dh),
                          pointer<void>(a),
                          pointer<float>(partial),
                          pointer<const void>(h),
                          pointer<const void>(d_out),
                          d_out_stride,
                          w,
                          along,
                          pointer<const void>(weights),
                          static_cast<DType>(weights_dtype),
                          inner,
                          reduced,
                          {static_cast<Activation>(activation), alpha, limit, interleaved}},
                         plan, {num_sms, pointer<int>(counter), stream_of(stream)});
        },
        py::kw_only(), "dh"_a, "a"_a, "partial"_a, "h"_a, "d_out"_a, "d_out_stride"_a, "w"_a, "along"_a, "weights"_a,
        "weights_dtype"_a, "inner"_a, "reduced"_a, "activation"_a, "alpha"_a, "limit"_a, "interleaved"_a, "plan"_a,
        "num_sms"_a, "counter"_a, "stream"_a);
    m.def(
        "grouped_wgrad",
        [](uintptr_t dw, int dw_dtype, uintptr_t lhs, int64_t lhs_stride, uintptr_t rhs, int64_t rhs_stride, int64_t m,
           int64_t n, bool gather_lhs, bool accumulate, const Plan& plan, int num_sms, uintptr_t counter,
           uintptr_t stream) {
            grouped_wgrad({pointer<void>(dw), static_cast<DType>(dw_dtype), pointer<const void>(lhs),
                           pointer<const void>(rhs), lhs_stride, rhs_stride, m, n, gather_lhs, accumulate},
                          plan, {num_sms, pointer<int>(counter), stream_of(stream)});
        },
        py::kw_only(), "dw"_a, "dw_dtype"_a, "lhs"_a, "lhs_stride"_a, "rhs"_a, "rhs_stride"_a, "m"_a, "n"_a,
        "gather_lhs"_a, "accumulate"_a, "plan"_a, "num_sms"_a, "counter"_a, "stream"_a);
    m.def("grouped_gemm_tile_columns", &grouped_gemm_tile_columns, py::kw_only(), "width"_a, "reduced"_a, "across"_a,
          "Columns of the tiles that grouped_gemm takes.");
    m.def("grouped_wgrad_takes_tall", &grouped_wgrad_takes_tall, py::kw_only(), "gathered_width"_a,
          "contiguous_width"_a, "Whether grouped_wgrad takes tiles of 256 gathered columns by 192, not 128 by 256.");
    m.def("row_sums_workspace", &row_sums_workspace, py::kw_only(), "num_rows"_a, "num_experts"_a, "width"_a,
          "float32 words of scratch memory that row_sums needs.");
    m.def(
        "row_sums",
        [](uintptr_t sums, int sums_dtype, uintptr_t rows, int64_t row_stride, int64_t width, uintptr_t workspace,
           const Plan& plan, uintptr_t stream) {
            row_sums({pointer<void>(sums), static_cast<DType>(sums_dtype), pointer<const void>(rows), row_stride, width,
                      pointer<float>(workspace)},
                     plan, stream_of(stream));
        },
        py::kw_only(), "sums"_a, "sums_dtype"_a, "rows"_a, "row_stride"_a, "width"_a, "workspace"_a, "plan"_a,
        "stream"_a);
}
#endif

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
    bind_topk_route(m);
    bind_combine(m);
    bind_permute(m);
    bind_weights(m);
    bind_decode_experts(m);
#ifdef MOE_KERNELS_SM90
    m.attr("sm90") = true;
    m.attr("TILE_N") = kTileN;
    bind_sm90(m);
#else
    m.attr("sm90") = false;
#endif
}
