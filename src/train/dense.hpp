#pragma once

#include <cstdint>

namespace bitwright::train {

/// A matrix in memory. Either stride is 1.
struct Matrix {
  const void* data;
  bool bf16;  ///< bfloat16, else float32
  int64_t rows, columns, row_stride, column_stride;

  static Matrix of(const float* data, int64_t rows, int64_t columns) {
    return {data, false, rows, columns, columns, 1};
  }
  Matrix transposed() const { return {data, bf16, columns, rows, column_stride, row_stride}; }
};

/// out = a b, or out += a b, with sums in float32, on the threads of libtorch (oneDNN: AMX where the CPU has it). `a`
/// and `b` are of one type. out: [a.rows, b.columns] at row `stride`; bias: [b.columns], added to each row, or null.
void multiply(const Matrix& a, const Matrix& b, float* out, int64_t stride, bool add = false,
              const float* bias = nullptr);

}  // namespace bitwright::train
