#include <algorithm>
#include <numeric>

#include "scheme/rows.hpp"

namespace bitwright {

SortedTable::SortedTable(std::span<const float> values) : codes_(values.size()) {
  std::iota(codes_.begin(), codes_.end(), 0u);
  std::stable_sort(codes_.begin(), codes_.end(), [&](uint32_t a, uint32_t b) { return values[a] < values[b]; });
  for (size_t i = 0; i + 1 < codes_.size(); ++i)
    midpoints_.push_back((values[codes_[i]] + values[codes_[i + 1]]) / 2.0f);
}

uint32_t SortedTable::nearest(float value) const {
  const auto above = std::lower_bound(midpoints_.begin(), midpoints_.end(), value);
  return codes_[static_cast<size_t>(above - midpoints_.begin())];
}

}  // namespace bitwright
