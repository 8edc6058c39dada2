#include "scheme/grouping.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.hpp"

namespace bitwright {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

[[noreturn]] void does_not_apply(const Shape& shape, const std::string& why) {
  throw Error({.code = "bad-scheme", .what = "grouping does not apply to shape " + to_string(shape), .why = why});
}

/// Position of `axis` (counted from the end) in `shape`.
size_t axis_position(const Grouping& grouping, const Shape& shape) {
  const auto rank = static_cast<int>(shape.size());
  if (grouping.axis >= 0 || grouping.axis < -2 || rank + grouping.axis < 0)
    does_not_apply(shape, fmt::format("it has no axis {}", grouping.axis));
  return static_cast<size_t>(rank + grouping.axis);
}

Shape leading(const Shape& shape) { return shape.size() <= 2 ? Shape{} : Shape(shape.begin(), shape.end() - 2); }

void need_matrix(const Shape& shape) {
  if (shape.size() < 2) does_not_apply(shape, "it needs two dimensions");
}

}  // namespace

Shape parameter_shape(const Grouping& grouping, const Shape& shape) {
  if (grouping.size < 0) does_not_apply(shape, "negative group size");
  switch (grouping.kind) {
    case Grouping::Kind::tensor:
      return leading(shape);
    case Grouping::Kind::axis: {
      Shape out = shape;
      int64_t& line = out[axis_position(grouping, shape)];
      line = grouping.size == 0 ? std::min<int64_t>(line, 1) : ceil_div(line, grouping.size);
      return out;
    }
    case Grouping::Kind::flat: {
      if (grouping.size == 0) does_not_apply(shape, "group size 0");
      const int64_t count = element_count(shape);
      if (grouping.interleaved && count % grouping.size != 0)
        does_not_apply(shape, fmt::format("{} elements are no multiple of the group size {}", count, grouping.size));
      return {ceil_div(count, grouping.size)};
    }
    case Grouping::Kind::block: {
      need_matrix(shape);
      if (grouping.block_rows <= 0 || grouping.block_columns <= 0) does_not_apply(shape, "empty blocks");
      Shape out = leading(shape);
      out.push_back(ceil_div(shape[shape.size() - 2], grouping.block_rows));
      out.push_back(ceil_div(shape.back(), grouping.block_columns));
      return out;
    }
    case Grouping::Kind::index: {
      need_matrix(shape);
      if (grouping.size == 0) does_not_apply(shape, "group size 0");
      Shape out = shape;
      out.back() = ceil_div(out.back(), grouping.size);
      return out;
    }
  }
  return {};
}

GroupMap::GroupMap(const Grouping& grouping, const Shape& shape, std::vector<int32_t> group_index)
    : grouping_(grouping), group_index_(std::move(group_index)), elements_(element_count(shape)) {
  group_count_ = element_count(parameter_shape(grouping, shape));
  columns_ = shape.empty() ? 1 : shape.back();
  rows_ = shape.size() < 2 ? 1 : shape[shape.size() - 2];
  size_ = grouping.size;
  if (grouping.kind == Grouping::Kind::axis) {
    line_ = shape[axis_position(grouping, shape)];
    inner_ = grouping.axis == -1 ? 1 : columns_;
    if (size_ == 0) size_ = std::max<int64_t>(line_, 1);
    groups_a_line_ = ceil_div(line_, size_);
  } else if (grouping.kind == Grouping::Kind::block) {
    block_columns_ = ceil_div(columns_, grouping.block_columns);
    blocks_a_matrix_ = block_columns_ * ceil_div(rows_, grouping.block_rows);
  } else if (grouping.kind == Grouping::Kind::index) {
    groups_a_line_ = ceil_div(columns_, size_);
    if (static_cast<int64_t>(group_index_.size()) != columns_)
      does_not_apply(shape, fmt::format("{} group indices for {} columns", group_index_.size(), columns_));
    for (const int32_t g : group_index_)
      if (g < 0 || g >= groups_a_line_) does_not_apply(shape, fmt::format("group index {} of {}", g, groups_a_line_));
  }
}

int64_t GroupMap::group_of(int64_t i) const {
  switch (grouping_.kind) {
    case Grouping::Kind::tensor:
      return i / (rows_ * columns_);
    case Grouping::Kind::axis: {
      const int64_t inner = i % inner_, along = i / inner_ % line_, outer = i / inner_ / line_;
      return (outer * groups_a_line_ + along / size_) * inner_ + inner;
    }
    case Grouping::Kind::flat:
      return grouping_.interleaved ? i % group_count_ : i / size_;
    case Grouping::Kind::block: {
      const int64_t column = i % columns_, row = i / columns_ % rows_, matrix = i / columns_ / rows_;
      return matrix * blocks_a_matrix_ + row / grouping_.block_rows * block_columns_ + column / grouping_.block_columns;
    }
    case Grouping::Kind::index:
      return i / columns_ * groups_a_line_ + group_index_[static_cast<size_t>(i % columns_)];
  }
  return 0;
}

int64_t GroupMap::run_length(int64_t i) const {
  switch (grouping_.kind) {
    case Grouping::Kind::tensor:
      return rows_ * columns_ - i % (rows_ * columns_);
    case Grouping::Kind::axis: {
      if (inner_ != 1) return 1;
      const int64_t along = i % line_;
      return std::min(size_ - along % size_, line_ - along);
    }
    case Grouping::Kind::flat:
      return grouping_.interleaved ? 1 : std::min(size_ - i % size_, elements_ - i);
    case Grouping::Kind::block: {
      const int64_t column = i % columns_;
      return std::min(grouping_.block_columns - column % grouping_.block_columns, columns_ - column);
    }
    case Grouping::Kind::index:
      return 1;
  }
  return 1;
}

void GroupMap::for_each_run(int64_t group, const std::function<void(Run)>& visit) const {
  switch (grouping_.kind) {
    case Grouping::Kind::tensor:
      return visit({group * rows_ * columns_, 1, rows_ * columns_});
    case Grouping::Kind::axis: {
      const int64_t inner = group % inner_, in_line = group / inner_ % groups_a_line_;
      const int64_t outer = group / inner_ / groups_a_line_;
      const int64_t first = in_line * size_;
      return visit({(outer * line_ + first) * inner_ + inner, inner_, std::min(size_, line_ - first)});
    }
    case Grouping::Kind::flat:
      if (grouping_.interleaved) return visit({group, group_count_, size_});
      return visit({group * size_, 1, std::min(size_, elements_ - group * size_)});
    case Grouping::Kind::block: {
      const int64_t matrix = group / blocks_a_matrix_, in_matrix = group % blocks_a_matrix_;
      const int64_t row = in_matrix / block_columns_ * grouping_.block_rows;
      const int64_t column = in_matrix % block_columns_ * grouping_.block_columns;
      const int64_t count = std::min(grouping_.block_columns, columns_ - column);
      for (int64_t r = row; r < std::min(row + grouping_.block_rows, rows_); ++r)
        visit({(matrix * rows_ + r) * columns_ + column, 1, count});
      return;
    }
    case Grouping::Kind::index: {
      const int64_t row = group / groups_a_line_;
      for (int64_t k = 0; k < columns_; ++k)
        if (group_index_[static_cast<size_t>(k)] == group % groups_a_line_) visit({row * columns_ + k, 1, 1});
      return;
    }
  }
}

}  // namespace bitwright
