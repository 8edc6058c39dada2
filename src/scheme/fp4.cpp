#include <array>

#include "scheme/rows.hpp"

namespace bitwright {
namespace {

/// Sign, 2-bit exponent, 1-bit mantissa in bitsandbytes' own code order; codes 0 and 8 are both 0.
constexpr std::array<float, 16> kValues = {
    0.0f, 0.0625f / 12,  8.0f / 12,  12.0f / 12,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

constexpr std::array kRows = {table_row<kValues>("fp4", "bitsandbytes 0.50 functional.py, quantize_4bit")};

}  // namespace

const std::span<const ElementType> fp4_rows = kRows;

}  // namespace bitwright
