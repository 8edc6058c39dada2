#include <algorithm>
#include <array>
#include <cmath>

#include "algorithm/algorithm.hpp"

namespace bitwright {
namespace {

constexpr int kCandidates = 48;  ///< ranges tried: the whole one, then each 1/64 narrower
constexpr float kStep = 1.0f / 64;
constexpr size_t kLanes = 16;

/// Sum of squared rounding errors of `values` for one scale and zero point; an estimate in the last bits (it multiplies
/// by the reciprocal, the encoder divides). The order of additions is fixed (16 partial sums), so that the winner is
/// the same on every machine.
float integer_error(const ElementType& type, std::span<const float> values, float scale, float zero) {
  const float inverse = scale == 0 ? 0 : 1 / scale;
  // Adding and taking off 1.5 * 2^23 rounds to the nearest integer, ties to even, below 2^22; clamped first.
  constexpr float kRound = 12582912.0f;
  const float lowest = type.lowest - zero, highest = type.highest - zero;
  std::array<float, kLanes> sums = {};
  const auto add = [&](size_t i, size_t lane) {
    const float clamped = std::min(std::max(values[i] * inverse, lowest), highest);
    const float error = values[i] - ((clamped + kRound) - kRound) * scale;
    sums[lane] += error * error;
  };
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  for (size_t lane = 0; i < values.size(); ++i, ++lane) add(i, lane);
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
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

float range_error(const Scheme& scheme, std::span<const float> values, Range range) {
  const Scheme& stored = *scheme.scale->scheme;
  float scale = ideal_scale(scheme, range);
  if (stored.is_plain()) {
    if (const auto dtype = dtype_of(*stored.element)) scale = round_to(*dtype, scale);
  }
  if (!std::isfinite(scale)) return INFINITY;
  const bool has_zero = scheme.offset_kind == OffsetKind::zero_point;
  const float zero = has_zero ? zero_point(scheme, scale, range) : 0;
  if (scheme.element->kind == ElementKind::integer) return integer_error(*scheme.element, values, scale, zero);
  return any_error(scheme, values, {.scale = scale, .offset = zero});
}

/// The range r * [low, high], r <= 1, with the least squared error; the widest of equals. Clipping a group's outliers
/// buys finer steps for the rest.
Range least_squares_range(const Scheme& scheme, std::span<const float> values) {
  const Range whole = min_max_range(scheme, values);
  Range best = whole;
  float least = range_error(scheme, values, whole);
  for (int candidate = 1; candidate < kCandidates; ++candidate) {
    const float r = 1 - kStep * static_cast<float>(candidate);
    const Range range = {whole.low * r, whole.high * r};
    const float error = range_error(scheme, values, range);
    if (error < least) {
      least = error;
      best = range;
    }
  }
  return best;
}

QuantizedTensor quantize(const Scheme& scheme, const Shape& shape, WeightView weight, const AlgorithmOptions& options) {
  std::vector<float> values(weight.count());
  to_f32(weight.dtype, weight.bytes, values);
  return encode(scheme, shape, values, options.range == RangeRule::mse ? least_squares_range : min_max_range);
}

}  // namespace

extern const Algorithm rtn_algorithm;
const Algorithm rtn_algorithm = {
    .name = "rtn",
    .summary = "round to nearest; ranges by minimum and maximum or by least squared error; needs no data",
    .source = "scheme/encode.cpp is the definition",
    .quantize = quantize};

}  // namespace bitwright
