#pragma once

#include <span>
#include <vector>

#include "scheme/scheme.hpp"

namespace bitwright {

// The registry: each file of schemes.def defines its rows.
#define SCHEME(name) extern const std::span<const ElementType> name##_rows;
#include "scheme/schemes.def"

/// A table type's values in rising order with the code of each, as bitsandbytes sorts them (stable), and the points
/// halfway between neighbours, in f32. A value on such a point goes to the lower entry.
class SortedTable {
 public:
  explicit SortedTable(std::span<const float> values);  ///< values[code]
  uint32_t nearest(float value) const;

 private:
  std::vector<uint32_t> codes_;
  std::vector<float> midpoints_;
};

}  // namespace bitwright
