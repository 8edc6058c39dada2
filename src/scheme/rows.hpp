#pragma once

#include <bit>
#include <span>
#include <string_view>
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
  std::span<const uint32_t> codes() const { return codes_; }
  std::span<const float> midpoints() const { return midpoints_; }

 private:
  std::vector<uint32_t> codes_;
  std::vector<float> midpoints_;
};

/// The row of a table type: `values` by code, all in [-1, 1], a power of two of them.
template <const auto& values>
constexpr ElementType table_row(std::string_view name, std::string_view source) {
  return {.name = name,
          .source = source,
          .kind = ElementKind::table,
          .bits = std::bit_width(values.size()) - 1,
          .lowest = -1,
          .highest = 1,
          .full_scale = 1,
          .decode = [](const ElementType&, uint32_t code) { return values.at(code); },
          .nearest =
              [](const ElementType&, float value) {
                static const SortedTable table(values);
                return table.nearest(value);
              }};
}

}  // namespace bitwright
