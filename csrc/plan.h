// The routing plan as the kernels take it; routing_plan.cu makes it.
#pragma once

namespace moe_kernels {

struct Plan {
    const int* offsets;  // [E + 1]
    const int* slots;    // [R], or null where nothing is gathered
    const int* tiles;    // [2, num_tiles]; null where tiles are not of rows
    int num_tiles;
    int num_experts;
    int num_rows;  // R
    int top_k;
};

}  // namespace moe_kernels
