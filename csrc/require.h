// What an entry point relies on, checked before it launches anything.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "dtype.h"
#include "plan.h"
#include "weights.h"

namespace moe_kernels {

// std::invalid_argument, in Python a ValueError. The parts of the message are put together only when it is needed.
template <typename... Parts>
void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

// Messages name the op and the argument.
struct Needs {
    const char* op;

    // A width; twice as much still fits an int.
    void multiple(const char* name, int64_t value, int of) const {
        require(value > 0 && value < 1 << 30 && value % of == 0, op, ": ", name, " must be a positive multiple of ", of,
                " below 2**30, got ", value);
    }

    void present(const char* name, const void* data) const {
        require(data != nullptr, op, ": ", name, " must not be null");
    }

    void dtype(const char* name, DType dtype) const {
        require(dtype >= DType::kFloat32 && dtype <= DType::kFloat16, op, ": ", name,
                " must be float32, bfloat16 or float16");
    }

    // Memory that is read or written 16 bytes at a time.
    void aligned(const char* name, const void* data) const {
        present(name, data);
        require(reinterpret_cast<uintptr_t>(data) % 16 == 0, op, ": ", name, " must start at a multiple of 16 bytes");
    }

    // The stride of a single row says nothing.
    void stride(const char* name, int64_t stride, int64_t rows, int element_bytes) const {
        require(rows <= 1 || stride * element_bytes % 16 == 0, op, ": ", name,
                " must have rows that start at multiples of 16 bytes, its stride is ", stride);
    }

    void rows(const char* name, const void* data, int64_t row_stride, int64_t rows, int element_bytes) const {
        if (rows == 0) return;
        aligned(name, data);
        stride(name, row_stride, rows, element_bytes);
    }

    // Memory that is read or written four elements at a time.
    void quads(const char* name, const void* data, int64_t row_stride, int64_t rows, int element_bytes) const {
        if (rows == 0) return;
        present(name, data);
        require(reinterpret_cast<uintptr_t>(data) % (4 * element_bytes) == 0 && (rows <= 1 || row_stride % 4 == 0), op,
                ": ", name, " must have rows that start at multiples of 4 elements, its stride is ", row_stride);
    }

    // Of 16-bit elements.
    void weights(const Weights& w, int num_experts, int64_t rows, int64_t columns) const {
        aligned("w", w.data);
        require(w.rows == rows && w.columns == columns, op, ": w must be [E, ", rows, ", ", columns, "], got [E, ",
                w.rows, ", ", w.columns, "]");
        stride("w", w.row_stride, w.rows, 2);
        stride("w", w.expert_stride, num_experts, 2);
    }

    void plan(const Plan& plan) const {
        present("offsets", plan.offsets);
        require(plan.num_experts >= 1, op, ": num_experts must be positive, got ", plan.num_experts);
        require(plan.top_k >= 1 && plan.num_rows >= 1 && plan.num_rows % plan.top_k == 0, op,
                ": num_rows must be a positive multiple of top_k, got ", plan.num_rows, " and ", plan.top_k);
    }
};

}  // namespace moe_kernels
