#include "container/mlx_rounding.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/weights.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on
constexpr float kLargestE4m3 = 448, kLargestE2m1 = 6;

/// visit(group, its values) in parallel; all values are finite.
template <class Visit>
void for_each_group(WeightView weight, size_t group_size, const Visit& visit) {
  check_weight_dtype(weight.dtype, "MLX");
  parallel_ranges(weight.count() / group_size, kChunk / group_size, [&](size_t begin, size_t end) {
    const std::vector<float> values = finite_values(weight, begin * group_size, end * group_size);
    for (size_t g = begin; g < end; ++g) visit(g, std::span(values).subspan((g - begin) * group_size, group_size));
  });
}

/// Smallest value, and the largest or 0. By integers of the same order, of which the compiler makes vector loops.
Range range_of(std::span<const float> values) {
  const auto ordered = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  int32_t low = INT32_MAX, high = 0;
  for (const float value : values) {
    const int32_t order = ordered(std::bit_cast<int32_t>(value));
    low = order < low ? order : low;
    high = order > high ? order : high;
  }
  return {std::bit_cast<float>(ordered(low)), std::bit_cast<float>(high)};
}

/// The range's end of larger magnitude becomes a whole number of steps from 0, so that 0 is exact; codes count from it.
GroupParameters affine_parameters(Range range, float most) {
  constexpr float kLeast = 1e-7f;
  const bool from_low = std::fabs(range.low) > std::fabs(range.high);
  const float width = std::max((range.high - range.low) / most, kLeast);
  if (!std::isfinite(width)) throw_scale_overflow(width, "float32");
  const float step = from_low ? width : -width, edge = from_low ? range.low : range.high;
  const float steps = std::round(edge / step);
  if (steps == 0) return {.scale = step, .offset = 0};
  return {.scale = edge / steps, .offset = edge};
}

/// Halves away from zero. Values on the far side of the bias round to 0 at most, and truncation takes them there.
void affine_codes(std::span<const float> values, const GroupParameters& p, float most, std::byte* codes) {
  for (size_t i = 0; i < values.size(); ++i) {
    const float steps = std::min((values[i] - p.offset) / p.scale, most);
    const auto whole = static_cast<int32_t>(steps);
    codes[i] = static_cast<std::byte>(whole + (steps - static_cast<float>(whole) >= 0.5f ? 1 : 0));
  }
}

std::shared_ptr<const QuantizedTensor> stored(const Parameter& parameter, const Shape& shape,
                                              std::span<const float> values) {
  auto t = encode(*parameter.scheme, parameter_shape(parameter.grouping, shape), values);
  const std::vector<float> decoded = decode(t);
  for (size_t i = 0; i < decoded.size(); ++i)
    if (!std::isfinite(decoded[i])) throw_scale_overflow(values[i], parameter.scheme->element->name);
  return std::make_shared<const QuantizedTensor>(std::move(t));
}

/// Codes are chosen by scale and bias as computed, not as stored.
QuantizedTensor encode_affine(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const auto group_size = static_cast<size_t>(scheme.scale->grouping.size);
  const float most = scheme.element->highest;
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(weight.count())};
  std::vector<float> scales(weight.count() / group_size), biases(scales.size());
  for_each_group(weight, group_size, [&](size_t g, std::span<const float> values) {
    const GroupParameters p = affine_parameters(range_of(values), most);
    scales[g] = p.scale;
    biases[g] = p.offset;
    affine_codes(values, p, most, &t.codes[g * group_size]);
  });
  t.scale = stored(*scheme.scale, shape, scales);
  t.offset = stored(*scheme.offset, shape, biases);
  return t;
}

/// Its bits of a number: beyond the largest the largest, NaN never.
uint8_t saturated_e4m3(float value) { return f32_to_e4m3(std::clamp(value, -kLargestE4m3, kLargestE4m3)); }

/// The power of two whose logarithm is nearest (not the nearest power); of 0 the least. log2 is rounded to f32 before.
uint8_t nearest_power(float value) {
  constexpr float kBias = 127;
  const auto logarithm = static_cast<float>(std::log2(static_cast<double>(value)));
  return static_cast<uint8_t>(std::clamp(std::round(logarithm), -kBias, kBias) + kBias);
}

/// Ties to the even mantissa; the sign is the value's, of 0 too.
void e2m1_codes(std::span<const float> values, float inverse, std::byte* codes) {
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = values[i] * inverse, m = std::fabs(value);
    const int32_t code = (m > 0.25f ? 1 : 0) + (m >= 0.75f ? 1 : 0) + (m > 1.25f ? 1 : 0) + (m >= 1.75f ? 1 : 0) +
                         (m > 2.5f ? 1 : 0) + (m >= 3.5f ? 1 : 0) + (m > 5.0f ? 1 : 0);
    codes[i] = static_cast<std::byte>(code | (std::bit_cast<int32_t>(value) >> 28 & 8));
  }
}

void e4m3_codes(std::span<const float> values, float inverse, std::byte* codes) {
  for (size_t i = 0; i < values.size(); ++i) codes[i] = static_cast<std::byte>(saturated_e4m3(values[i] * inverse));
}

float tensor_maximum(WeightView weight) {
  check_weight_dtype(weight.dtype, "MLX");
  std::vector<float> maxima((weight.count() + kChunk - 1) / kChunk);
  parallel_ranges(weight.count(), kChunk, [&](size_t begin, size_t end) {
    maxima[begin / kChunk] = absmax_of(finite_values(weight, begin, end));
  });
  return absmax_of(maxima);
}

/// The numbers of `scheme`, the scale's, under a global one: e4m3, {f32, divided by a constant}.
std::shared_ptr<const QuantizedTensor> global_scale(const Scheme& scheme, float maximum) {
  constexpr float kRange = kLargestE4m3 * kLargestE2m1;
  QuantizedTensor t = {.scheme = *scheme.scale->scheme, .shape = {}};
  const auto bytes = std::as_bytes(std::span(&maximum, 1));
  t.codes.assign(bytes.begin(), bytes.end());
  t.scale = plain_tensor(std::span(&kRange, 1), {});
  return std::make_shared<const QuantizedTensor>(std::move(t));
}

/// mxfp4, mxfp8 and nvfp4: no offset; scales of 8 bits.
QuantizedTensor encode_float(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const auto group_size = static_cast<size_t>(scheme.scale->grouping.size);
  const Scheme& scales = *scheme.scale->scheme;
  const bool power = scales.element == &float_element(DType::f8_e8m0), global = scales.scale.has_value();
  const bool four = scheme.element->bits == 4;
  const float maximum = global ? tensor_maximum(weight) : 0;
  const float spread = global && maximum > 0 ? kLargestE4m3 * kLargestE2m1 / maximum : 1;
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(weight.count())};
  QuantizedTensor stored_scales = {.scheme = scales, .shape = parameter_shape(scheme.scale->grouping, shape)};
  stored_scales.codes.resize(weight.count() / group_size);
  for_each_group(weight, group_size, [&](size_t g, std::span<const float> values) {
    const float ideal = absmax_of(values) / (four ? kLargestE2m1 : kLargestE4m3) * spread;
    const uint8_t code = power ? nearest_power(ideal) : saturated_e4m3(ideal);
    const float scale = power ? e8m0_to_f32(code) : e4m3_to_f32(code);
    stored_scales.codes[g] = std::byte{code};
    (four ? e2m1_codes : e4m3_codes)(values, scale == 0 ? 0 : spread / scale, &t.codes[g * group_size]);
  });
  if (global) stored_scales.scale = global_scale(scales, maximum);
  t.scale = std::make_shared<const QuantizedTensor>(std::move(stored_scales));
  return t;
}

}  // namespace

QuantizedTensor encode_mlx(const Scheme& scheme, const Shape& shape, WeightView weight) {
  return scheme.offset ? encode_affine(scheme, shape, weight) : encode_float(scheme, shape, weight);
}

}  // namespace bitwright
