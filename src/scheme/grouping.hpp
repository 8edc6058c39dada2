#pragma once

#include <functional>
#include <vector>

#include "scheme/scheme.hpp"

namespace bitwright {

/// The shape of a parameter array: one number for each group of a tensor of `shape`.
/// Throws Error{"bad-scheme"} if the grouping does not apply (a zero size, too few dimensions).
Shape parameter_shape(const Grouping& grouping, const Shape& shape);

/// Groups of one tensor, numbered as the parameter array (row-major) numbers them.
class GroupMap {
 public:
  /// group_index: for Kind::index one group a column, each checked to be in range; else empty.
  GroupMap(const Grouping& grouping, const Shape& shape, std::vector<int32_t> group_index = {});

  int64_t group_count() const { return group_count_; }
  /// The group of the element at row-major position `i`.
  int64_t group_of(int64_t i) const;
  /// How many elements i, i + 1, … are surely of one group: at least 1, at most up to the group's end.
  int64_t run_length(int64_t i) const;

  /// A group's elements: start, start + stride, … Groups of one kind may need several runs.
  struct Run {
    int64_t start, stride, count;
  };
  void for_each_run(int64_t group, const std::function<void(Run)>& visit) const;

 private:
  Grouping grouping_;
  std::vector<int32_t> group_index_;
  int64_t elements_, rows_ = 1, columns_ = 1;  ///< of one matrix: the last two dimensions
  int64_t line_ = 1, inner_ = 1, size_ = 1;    ///< axis: its length, elements between neighbours, elements a group
  int64_t groups_a_line_ = 1, block_columns_ = 1, blocks_a_matrix_ = 1;
  int64_t group_count_ = 0;
};

}  // namespace bitwright
