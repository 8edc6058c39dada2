#pragma once

#include <cstddef>
#include <span>

#include "kernels/kernel_level.hpp"
#include "kernels/packed_matrix.hpp"

namespace bitwright {

/// y[m, n] = sum over k = 0, 1, … of x[m, k] * w[n, k] in f32, each step one fused multiply-add, from 0, where w is
/// what scheme's Decoder gives. x: [m, w.columns], y: [m, w.rows]. The same bits for every level and number of threads.
void multiply(const float* x, size_t m, const PackedMatrix& w, float* y,
              const KernelLevel& level = active_kernel_level());

/// One row of `w` as f32; out: w.columns values.
void expand_row(const PackedMatrix& w, size_t row, std::span<float> out,
                const KernelLevel& level = active_kernel_level());

}  // namespace bitwright
