#include "scheme/affine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/error.hpp"

namespace bitwright {
namespace {

/// As x86 converts: of what 32 bits do not hold, the least.
int64_t to_int32(float value) {
  const bool holds = value >= -0x1p31f && value < 0x1p31f;
  return holds ? static_cast<int64_t>(std::nearbyint(value)) : std::numeric_limits<int32_t>::min();
}

}  // namespace

void check_affine(const ElementType& element, const AffineRange& range, int64_t zero) {
  const auto fail = [&](const std::string& why) {
    throw Error({.code = "bad-scheme", .what = "cannot quantize to integers", .why = why});
  };
  if (range.low > range.high) fail(fmt::format("the lowest code {} is above the highest {}", range.low, range.high));
  if (static_cast<float>(range.low) < element.lowest || static_cast<float>(range.high) > element.highest)
    fail(fmt::format("codes {} to {} are not those of {}", range.low, range.high, element.name));
  if (zero < range.low || zero > range.high)
    fail(fmt::format("zero point {} is none of the codes {} to {}", zero, range.low, range.high));
}

int64_t quantize_affine(float value, const AffineParameters& p, const AffineRange& range) {
  return std::clamp(to_int32(value * (1.0f / p.scale)) + p.zero, range.low, range.high);
}

int64_t quantize_float_zero(float value, float scale, float zero, const AffineRange& range) {
  return std::clamp(to_int32(value * (1.0f / scale) + zero), range.low, range.high);
}

AffineParameters choose_affine(Range values, AffineMapping mapping, const AffineRange& range, float least) {
  const float low = std::min(values.low, 0.0f), high = std::max(values.high, 0.0f);
  const auto lowest = static_cast<float>(range.low), highest = static_cast<float>(range.high);
  const int64_t middle = (range.low + range.high + 1) / 2;
  switch (mapping) {
    case AffineMapping::symmetric:
      return {std::max(std::max(-low, high) / ((highest - lowest) / 2), least), middle};
    case AffineMapping::symmetric_no_clipping:
      return {std::max(std::max(low / lowest, high / highest), least), middle};
    case AffineMapping::asymmetric:
      break;
  }
  const float scale = std::max((high - low) / (highest - lowest), least);
  const auto zero = range.low - static_cast<int64_t>(std::nearbyint(low / scale));
  return {scale, std::clamp(zero, range.low, range.high)};
}

}  // namespace bitwright
