#include <array>

#include "scheme/rows.hpp"

namespace bitwright {
namespace {

/// Sign, 2-bit exponent, 1-bit mantissa in bitsandbytes' own code order; codes 0 and 8 are both 0.
constexpr std::array<float, 16> kValues = {
    0.0f, 0.0625f / 12,  8.0f / 12,  12.0f / 12,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

float decode(const ElementType&, uint32_t code) { return kValues.at(code); }

uint32_t nearest(const ElementType&, float value) {
  static const SortedTable table(kValues);
  return table.nearest(value);
}

constexpr std::array<ElementType, 1> kRows = {{{.name = "fp4",
                                                .source = "bitsandbytes 0.50 functional.py, quantize_4bit",
                                                .kind = ElementKind::table,
                                                .bits = 4,
                                                .lowest = -1,
                                                .highest = 1,
                                                .full_scale = 1,
                                                .decode = decode,
                                                .nearest = nearest}}};

}  // namespace

const std::span<const ElementType> fp4_rows = kRows;

}  // namespace bitwright
