// Results on their way out: from the accumulators, 64 rows by 64 columns at a time, to shared memory and on to memory.
#pragma once

#include "sm90/pipeline.cuh"

namespace moe_kernels {

// A column chunk [64 rows, 64 columns] of a consumer's results on its way out: to shared memory as the copy engine
// wants it, then by the engine; the last rows of an expert by ordinary stores, since a box would cover the next
// expert's. Each warp sends the 16 rows that it has made.
constexpr int kWarpRows = 16;
struct RowsOut {
    const CUtensorMap* map;  // [R, parts, width], box [kWarpRows, 1, 64]
    void* data;
    int64_t row_stride;  // elements, parts * width
    int width;
};

// Staging memory: each consumer has kBuffers chunks, and uses them in turn.
constexpr int kBuffers = 2;
constexpr int kBuffersBytes = kConsumers * kBuffers * kChunkBytes;

// Results through a piece of staging memory, once all but the newest kPending of its copies have read theirs. By all
// threads that write the piece: `meet` lets them wait for each other, the leader is the one that sends.
template <int kPending, typename Meet, typename Write, typename Send>
__device__ __forceinline__ void through_staging(bool leader, Meet meet, Write write, Send send) {
    if (leader) ptx::bulk_wait_read<kPending>();
    meet();
    write();
    ptx::fence_async_proxy();
    meet();
    send();
    if (leader) ptx::bulk_commit();
}

// The same for a warp's rows of a chunk, which it need not wait for the others to send.
template <int kPending, typename Write, typename Send>
__device__ __forceinline__ void through_staging_of_warp(Write write, Send send) {
    through_staging<kPending>(ptx::elect(), [] { __syncwarp(); }, write, send);
}

// Columns 2 * lane and the next of a chunk's bias, to all of its rows: 32 accumulators of the warp's lanes.
template <typename T>
__device__ __forceinline__ void add_bias(float* values, uint32_t pair, int lane) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // a thread's accumulators are of columns 8j + 2 * (lane % 4) and the next
        const uint32_t word = __shfl_sync(kFullWarp, pair, 4 * j + lane % 4);
        const float2 bias = to_float2(word, static_cast<const T*>(nullptr));
        values[4 * j] += bias.x;
        values[4 * j + 1] += bias.y;
        values[4 * j + 2] += bias.x;
        values[4 * j + 3] += bias.y;
    }
}

// Pairs of 16-bit results from 32 accumulators (8 groups of 8 columns) into a chunk, at a multiple of 1024 bytes.
template <typename T>
__device__ __forceinline__ void write_chunk(uint32_t chunk, int row, int lane, const float* values) {
    const uint32_t to = chunk + swizzled(row + (lane >> 3 & 1) * 8 + (lane & 7), lane >> 4);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = 4 * j + 2 * i;
            words[i] = from_floats(values[at], values[at + 1], static_cast<const T*>(nullptr));
        }
        // words: group j rows 0-7, group j rows 8-15, group j+1 rows 0-7, group j+1 rows 8-15
        ptx::stmatrix_x4(to ^ (j << 4), words);  // swizzled(.., j + (lane >> 4)), as j is even
    }
}

// All lanes of a warp, after a fence and a __syncwarp: its rows of some chunks, the first `rows` of them, to memory
// from row `first` on. `chunks(send)` calls send(out, from, part, column) for each. The elected lane commits
// afterwards.
template <typename T, typename Chunks>
__device__ __forceinline__ void send_rows(int lane, int first, int rows, Chunks chunks) {
    if (rows >= kWarpRows) {
        if (ptx::elect()) {
            chunks([&](const RowsOut& out, const unsigned char* from, int part, int n) {
                ptx::tma_store_3d(out.map, from, n, part, first);
            });
        }
        return;
    }
    chunks([&](const RowsOut& out, const unsigned char* from, int part, int n) {
        T* data = static_cast<T*>(out.data) + static_cast<int64_t>(first) * out.row_stride + part * out.width + n;
#pragma unroll
        for (int i = lane; i < kWarpRows * 8; i += kWarpSize) {
            const int row = i / 8, piece = i % 8;
            if (row < rows && n + piece * 8 < out.width) {
                *reinterpret_cast<uint4*>(data + row * out.row_stride + piece * 8) =
                    *reinterpret_cast<const uint4*>(from + swizzled(row, piece));
            }
        }
    });
}

}  // namespace moe_kernels
