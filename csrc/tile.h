// The tile of the Hopper kernels, for both sides. grouped_wgrad has its own, but for kTileK.
#pragma once

namespace moe_kernels {

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kTileK = 64;  // of the reduction

}  // namespace moe_kernels
