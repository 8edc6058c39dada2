#include "container/row_groups.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr int64_t kTask = int64_t{1} << 16;  ///< elements
constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

RowGroups::RowGroups(const Grouping& grouping, const Shape& shape)
    : columns_(shape.back()), matrix_rows_(shape.size() < 2 ? 1 : shape[shape.size() - 2]) {
  using Kind = Grouping::Kind;
  BW_ASSERT(grouping.kind == Kind::tensor || grouping.kind == Kind::block ||
            (grouping.kind == Kind::axis && grouping.axis == -1));
  const int64_t elements = element_count(shape);
  rows_ = columns_ == 0 ? 0 : elements / columns_;
  length_ = columns_;
  if (grouping.kind == Kind::axis && grouping.size != 0) length_ = grouping.size;
  if (grouping.kind == Kind::block) length_ = grouping.block_columns;
  length_ = std::max<int64_t>(std::min(length_, columns_), 1);
  segments_ = ceil_div(columns_, length_);
  if (grouping.kind == Kind::tensor) block_rows_ = std::max<int64_t>(matrix_rows_, 1);
  if (grouping.kind == Kind::block) block_rows_ = grouping.block_rows;
  groups_a_matrix_ = ceil_div(matrix_rows_, block_rows_) * segments_;
  count_ = element_count(parameter_shape(grouping, shape));
}

int64_t RowGroups::group_of(int64_t row, int64_t segment) const {
  return row / matrix_rows_ * groups_a_matrix_ + row % matrix_rows_ / block_rows_ * segments_ + segment;
}

void for_each_row(const RowGroups& groups, WeightView weight,
                  const std::function<void(int64_t row, std::span<const float> values)>& use) {
  const auto columns = static_cast<size_t>(groups.columns());
  const size_t bytes = columns * size_bytes(weight.dtype);
  const auto grain = static_cast<size_t>(std::max<int64_t>(kTask / std::max<int64_t>(groups.columns(), 1), 1));
  parallel_ranges(static_cast<size_t>(groups.rows()), grain, [&](size_t begin, size_t end) {
    std::vector<float> values(columns);
    for (size_t row = begin; row < end; ++row) {
      to_f32(weight.dtype, weight.bytes.subspan(row * bytes, bytes), values);
      use(static_cast<int64_t>(row), values);
    }
  });
}

std::vector<float> largest_magnitudes(const RowGroups& groups, WeightView weight) {
  std::vector<float> parts(static_cast<size_t>(groups.rows() * groups.segments()));
  for_each_row(groups, weight, [&](int64_t row, std::span<const float> values) {
    for (int64_t s = 0; s < groups.segments(); ++s) {
      const auto begin = static_cast<size_t>(s * groups.length());
      const auto part = values.subspan(begin, std::min(static_cast<size_t>(groups.length()), values.size() - begin));
      // As integers, whose maximum the compiler makes vectors of; what is not finite is larger than any number.
      int32_t most = 0;
      for (const float value : part) most = std::max(most, std::bit_cast<int32_t>(value) & kMagnitude);
      parts[static_cast<size_t>(row * groups.segments() + s)] =
          most < kInfinity ? std::bit_cast<float>(most) : std::numeric_limits<float>::quiet_NaN();
    }
  });
  // The first row that is not finite is named, whichever thread met it.
  std::vector<float> largest(static_cast<size_t>(groups.count()));
  for (int64_t row = 0; row < groups.rows(); ++row)
    for (int64_t s = 0; s < groups.segments(); ++s) {
      const float part = parts[static_cast<size_t>(row * groups.segments() + s)];
      for (int64_t i = row * groups.columns() + s * groups.length(); std::isnan(part); ++i) {
        const size_t size = size_bytes(weight.dtype);
        float value = 0;
        to_f32(weight.dtype, weight.bytes.subspan(static_cast<size_t>(i) * size, size), std::span(&value, 1));
        if (!std::isfinite(value)) throw_not_finite(i, value);
      }
      float& most = largest[static_cast<size_t>(groups.group_of(row, s))];
      most = std::max(most, part);
    }
  return largest;
}

}  // namespace bitwright
