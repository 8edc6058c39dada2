#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Which group the parts of a row belong to, of matrices or a stack of them: one group a matrix, row, part of a row or
/// block. Each row is cut into segments of `length` columns (the last may be shorter) that share their parameters.
class RowGroups {
 public:
  /// grouping: of kind tensor, axis -1 or block.
  RowGroups(const Grouping& grouping, const Shape& shape);

  int64_t rows() const { return rows_; }  ///< of all matrices
  int64_t columns() const { return columns_; }
  int64_t length() const { return length_; }
  int64_t segments() const { return segments_; }  ///< a row
  int64_t count() const { return count_; }        ///< groups
  int64_t group_of(int64_t row, int64_t segment) const;

 private:
  int64_t rows_, columns_, matrix_rows_, length_, segments_, count_;
  int64_t block_rows_ = 1, groups_a_matrix_;
};

/// use(row, values), each row once, its values as f32, in parallel.
void for_each_row(const RowGroups& groups, WeightView weight,
                  const std::function<void(int64_t row, std::span<const float> values)>& use);

/// Each group's largest magnitude. Throws Error{"not-finite"} with the position.
std::vector<float> largest_magnitudes(const RowGroups& groups, WeightView weight);

}  // namespace bitwright
