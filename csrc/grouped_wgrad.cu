// grouped_wgrad: dW[e] = sum over the rows r of expert e of lhs(r)^T . rhs(r), one side gathered by token or none; see
// grouped_wgrad.cuh for the kernel.
//
//     lhs [R or T, M], rhs [R or T, N] -> dW [E, M, N], or added to a dW that is there

#include <limits>

#include "grouped_wgrad.cuh"
#include "grouped_wgrad.h"
#include "tensor_map.h"

namespace moe_kernels {
namespace {

constexpr const char* kName = "grouped_wgrad";

template <typename Tiling, typename T, typename Out, bool kGatherLhs>
void launch_wgrad(const Wgrad& p, const Launch& launch) {
    launch_clusters<Tiling::kStages, Tiling::kStagingBytes, Tiling::kBytesOfStage>(
        kName, grouped_wgrad_kernel<Tiling, T, Out, kGatherLhs>, int64_t{p.num_experts} * p.num_pairs * p.num_columns,
        launch, p);
}

// What depends on the tile, and the launch.
template <typename Tiling, typename T>
void launch_tiles(Wgrad p, const GroupedWgradArguments& a, const Plan& plan, const Launch& launch) {
    const int64_t stride = a.gather_lhs ? a.rhs_stride : a.lhs_stride;
    p.contiguous_map = make_tensor_map(
        {p.contiguous, p.contiguous_width, plan.num_rows, 1, stride, 0, Tiling::kBoxRows, 1}, DType::kBFloat16);
    p.num_pairs = static_cast<int>(ceil_div(p.gathered_width, kCluster * Tiling::kM));
    p.num_columns = static_cast<int>(ceil_div(p.contiguous_width, Tiling::kN));
    if (a.dw_dtype == DType::kFloat32) {
        a.gather_lhs ? launch_wgrad<Tiling, T, float, true>(p, launch)
                     : launch_wgrad<Tiling, T, float, false>(p, launch);
    } else {
        a.gather_lhs ? launch_wgrad<Tiling, T, T, true>(p, launch) : launch_wgrad<Tiling, T, T, false>(p, launch);
    }
}

// Elements of dW that the tiles of an expert cover, columns past the widths among them.
template <typename Tiling>
int64_t covered(int64_t gathered_width, int64_t contiguous_width) {
    constexpr int kPair = kCluster * Tiling::kM;
    return ceil_div(gathered_width, kPair) * kPair * (ceil_div(contiguous_width, Tiling::kN) * Tiling::kN);
}

}  // namespace

// Tall tiles are taken for 5 % faster, as measured where both widths fit (docs/kernels.md, version 10).
bool grouped_wgrad_takes_tall(int64_t gathered_width, int64_t contiguous_width) {
    return covered<Tall>(gathered_width, contiguous_width) * 95 <=
           covered<Wide>(gathered_width, contiguous_width) * 100;
}

void grouped_wgrad(const GroupedWgradArguments& a, const Plan& plan, const Launch& launch) {
    using T = __nv_bfloat16;
    const bool in_float = a.dw_dtype == DType::kFloat32;
    const int64_t gathered_stride = a.gather_lhs ? a.lhs_stride : a.rhs_stride;
    const int64_t contiguous_stride = a.gather_lhs ? a.rhs_stride : a.lhs_stride;
    const Needs needs{kName};
    needs.plan(plan);
    needs.multiple("m", a.m, 8);
    needs.multiple("n", a.n, 8);
    const int top_k = plan.slots == nullptr ? 1 : plan.top_k;
    const int64_t tokens = plan.num_rows / top_k;
    const int64_t lhs_rows = a.gather_lhs ? tokens : plan.num_rows, rhs_rows = a.gather_lhs ? plan.num_rows : tokens;
    needs.rows("lhs", a.lhs, a.lhs_stride, lhs_rows, sizeof(T));
    needs.rows("rhs", a.rhs, a.rhs_stride, rhs_rows, sizeof(T));
    needs.aligned("dw", a.dw);
    require(in_float || a.dw_dtype == DType::kBFloat16, kName, ": dw_dtype must be bfloat16 or float32");
    // Strides are ints, numbers of tiles shorts.
    constexpr int64_t kFarthest = std::numeric_limits<int>::max();
    require((lhs_rows == 1 || a.lhs_stride <= kFarthest) && (rhs_rows == 1 || a.rhs_stride <= kFarthest), kName,
            ": lhs and rhs must have rows less than 2**31 elements apart");
    require(std::max(a.m, a.n) <= 1 << 22, kName, ": m and n must be at most 2**22, got ", a.m, " and ", a.n);

    Wgrad p{};
    p.gathered = a.gather_lhs ? a.lhs : a.rhs;
    p.contiguous = a.gather_lhs ? a.rhs : a.lhs;
    p.gathered_row_bytes = static_cast<uint32_t>(gathered_stride * sizeof(T));
    p.contiguous_stride = static_cast<uint32_t>(contiguous_stride);
    p.gathered_width = static_cast<int>(a.gather_lhs ? a.m : a.n);
    p.contiguous_width = static_cast<int>(a.gather_lhs ? a.n : a.m);
    p.dw = make_tensor_map({a.dw, a.n, a.m, plan.num_experts, a.n, a.m * a.n, a.gather_lhs ? kWarpRows : kRows, 1},
                           a.dw_dtype);
    p.offsets = plan.offsets;
    p.slots = plan.slots;
    p.top_k = divisor(top_k);
    p.m = static_cast<int>(a.m);
    p.n = static_cast<int>(a.n);
    p.accumulate = a.accumulate;
    p.num_experts = plan.num_experts;
    p.counter = launch.counter;
    if (grouped_wgrad_takes_tall(p.gathered_width, p.contiguous_width)) {
        launch_tiles<Tall, T>(p, a, plan, launch);
    } else {
        launch_tiles<Wide, T>(p, a, plan, launch);
    }
}

}  // namespace moe_kernels
