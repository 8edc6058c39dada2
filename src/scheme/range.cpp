#include "scheme/range.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.hpp"

namespace bitwright {
namespace {

/// Sum of squared rounding errors for one scale and zero point. It multiplies by the reciprocal where the encoder
/// divides, so single values may fall to the other side. Fused where it says so; two partial sums a piece, of the even
/// and the odd values.
float integer_error(const ElementType& type, std::span<const float> values, float scale, float inverse, float zero) {
  using R = RangeSearch;
  const float lowest = R::kRound + (type.lowest - zero), highest = R::kRound + (type.highest - zero);
  double total = 0;
  for (size_t begin = 0; begin < values.size(); begin += R::kPiece) {
    float sums[2] = {0, 0};
    for (size_t i = begin; i < std::min(values.size(), begin + R::kPiece); ++i) {
      const float rounded = std::min(std::max(std::fma(values[i], inverse, R::kRound), lowest), highest) - R::kRound;
      const float error = std::fma(-rounded, scale, values[i]);
      sums[i % 2] = std::fma(error, error, sums[i % 2]);
    }
    total += static_cast<double>(sums[0] + sums[1]);
  }
  return static_cast<float>(total);
}

float any_error(const Scheme& scheme, std::span<const float> values, const GroupParameters& p) {
  double total = 0;
  for (const float value : values) {
    const float element = scheme.element->decode(*scheme.element, encode_value(scheme, p, value));
    const double error = static_cast<double>(value) - static_cast<double>(decode_value(scheme, p, element));
    total += error * error;
  }
  return static_cast<float>(total);
}

/// Error where the whole range, whose ideal scale is `whole`, is narrowed to `share` of it. Scale and zero point by
/// products, where the encoder divides once the range is chosen.
float narrowed_error(const Scheme& scheme, std::span<const float> values, float low, float whole, float share) {
  const Scheme& stored = *scheme.scale->scheme;
  const ElementType& type = *scheme.element;
  float scale = whole * share;
  if (stored.is_plain()) {
    if (const auto dtype = dtype_of(*stored.element)) scale = round_to(*dtype, scale);
  }
  if (!std::isfinite(scale)) return INFINITY;
  if (type.kind != ElementKind::integer) return any_error(scheme, values, {.scale = scale});
  const float inverse = scale < RangeSearch::kLeastScale ? 0 : 1 / scale;
  float zero = 0;
  if (scheme.offset_kind == OffsetKind::zero_point)
    zero = std::clamp(std::nearbyint(type.lowest - std::min(low, 0.0f) * share * inverse), type.lowest, type.highest);
  return integer_error(type, values, scale, inverse, zero);
}

}  // namespace

Range least_squares_range(const Scheme& scheme, std::span<const float> values) {
  const Range whole = min_max_range(scheme, values);
  const float scale = ideal_scale(scheme, whole);
  const auto share = [](int k) { return 1 - RangeSearch::kStep * static_cast<float>(k); };
  const auto error_of = [&](int k) { return narrowed_error(scheme, values, whole.low, scale, share(k)); };
  int best = 0;
  float least = error_of(0);
  const auto attempt = [&](int k) {
    const float error = error_of(k);
    if (error < least) {
      least = error;
      best = k;
    }
    return error;
  };
  for (int k = RangeSearch::kStride; k < RangeSearch::kReach; k += RangeSearch::kStride)
    if (attempt(k) > RangeSearch::kHopeless * least) break;
  for (const int step : RangeSearch::kRefinements) {
    const int centre = best;
    attempt(std::max(centre - step, 0));
    attempt(centre + step);
  }
  return {whole.low * share(best), whole.high * share(best)};
}

Range choose_range(RangeRule rule, const Scheme& scheme, std::span<const float> values) {
  return rule == RangeRule::mse ? least_squares_range(scheme, values) : min_max_range(scheme, values);
}

void throw_not_finite(int64_t index, float value) {
  throw Error({.code = "not-finite",
               .what = "cannot quantize",
               .why = fmt::format("element {} is {} as float32", index, value),
               .fix = "the weights are damaged, fetch them again or retrain"});
}

void throw_scale_overflow(float scale, std::string_view type) {
  throw Error({.code = "scale-overflow",
               .what = "cannot quantize",
               .why = fmt::format("a scale of {} does not fit {}", scale, type),
               .fix = type == "float16" ? "use --scale-dtype float32 or bfloat16" : "skip the module"});
}

}  // namespace bitwright
