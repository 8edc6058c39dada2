#include "kernels/blockwise_adamw.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.hpp"
#include "base/vectorized.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {
namespace {

/// Rounds magnitudes in [0, 1] to a rising table. The upper bits of a float say between which thresholds it may lie:
/// never round more than one.
class MagnitudeTable {
 public:
  explicit MagnitudeTable(std::span<const float> magnitudes) {
    thresholds_.fill(std::numeric_limits<float>::infinity());
    for (size_t i = 0; i + 1 < magnitudes.size(); ++i) thresholds_.at(i) = (magnitudes[i] + magnitudes[i + 1]) * 0.5f;
    int32_t passed = 0;
    for (uint32_t b = 0; b < kBuckets; ++b) {
      bases_.at(b) = passed;
      const auto above = std::bit_cast<float>((b + kLeast + 1) << kShift);
      int inside = 0;
      for (; thresholds_.at(static_cast<size_t>(passed)) < above; ++passed) ++inside;
      BW_ASSERT(inside <= 1);
    }
  }

  /// The entry nearest to a magnitude of at most 1 and a little.
  [[gnu::always_inline]] int32_t nearest(float magnitude) const {
    const auto bits = static_cast<int32_t>(std::bit_cast<uint32_t>(magnitude) >> kShift);
    const int32_t base = bases_[static_cast<size_t>(std::clamp(bits - kLeast, 0, kBuckets - 1))];
    return base + static_cast<int32_t>(magnitude > thresholds_[static_cast<size_t>(base)]);
  }

 private:
  static constexpr int kShift = 16;                                              ///< 7 bits of the mantissa stay
  static constexpr int32_t kLeast = std::bit_cast<int32_t>(0x1p-24f) >> kShift;  ///< below every threshold
  static constexpr int32_t kBuckets = (std::bit_cast<int32_t>(1.0f) >> kShift) - kLeast + 1;
  std::array<int32_t, kBuckets> bases_{};
  std::array<float, 257> thresholds_{};
};

/// create_dynamic_map(signed=False) of bitsandbytes 0.50: 2, 4 … 128 evenly spaced values in the decades from 10^-6 to
/// 1, each in the middle of its interval; besides them 0 and 1.
std::array<float, 256> make_unsigned_values() {
  std::array<float, 256> values = {};
  size_t i = 1;
  double decade = 1e-6;
  for (int count = 2; count <= 128; count *= 2, decade *= 10)
    for (int k = 0; k < count; ++k, ++i) values.at(i) = static_cast<float>(decade * (0.1 + 0.9 * (k + 0.5) / count));
  values.at(i) = 1;
  return values;
}

constexpr int32_t kZero = 127;  ///< the code of 0 in the signed map

std::array<float, 256> make_signed_values() {
  std::array<float, 256> values = {};
  const ElementType& type = *find_element("dynamic8");
  for (uint32_t code = 0; code < values.size(); ++code) values.at(code) = type.decode(type, code);
  return values;
}

struct DynamicMaps {
  std::array<float, 256> signed_values = make_signed_values(), unsigned_values = make_unsigned_values();
  MagnitudeTable signed_magnitudes{std::span(signed_values).subspan(kZero)}, unsigned_magnitudes{unsigned_values};
};
const DynamicMaps& maps() {
  static const DynamicMaps all;
  return all;
}

/// What the block's values are multiplied with before they are rounded: 0 where their reciprocal is no float.
float reciprocal_of(float largest) { return largest >= std::numeric_limits<float>::min() ? 1 / largest : 0; }

[[gnu::always_inline]] inline float largest_of(std::span<const float> values) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float magnitude = std::fabs(values[i + lane]);
      lanes[lane] = magnitude > lanes[lane] ? magnitude : lanes[lane];
    }
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (; i < values.size(); ++i) largest = std::max(largest, std::fabs(values[i]));
  return largest;
}

/// codes[i] = code(values[i]), by way of words: bytes that are written could be any memory, also the tables.
template <class Code>
[[gnu::always_inline]] inline void encode_block(std::span<const float> values, uint8_t* codes, const Code& code) {
  std::array<int32_t, kMomentBlock> words;
  for (size_t i = 0; i < values.size(); ++i) words[i] = code(values[i]);
  for (size_t i = 0; i < values.size(); ++i) codes[i] = static_cast<uint8_t>(words[i]);
}

BITWRIGHT_VECTORIZED
float encode_signed_block(const MagnitudeTable& table, std::span<const float> values, uint8_t* codes) {
  const float largest = largest_of(values), reciprocal = reciprocal_of(largest);
  encode_block(values, codes, [&](float value) {
    const int32_t entry = table.nearest(std::fabs(value * reciprocal));
    return value < 0 ? kZero - std::min(entry, kZero) : kZero + entry;
  });
  return reciprocal == 0 ? 0 : largest;
}

BITWRIGHT_VECTORIZED
float encode_unsigned_block(const MagnitudeTable& table, std::span<const float> values, uint8_t* codes) {
  const float largest = largest_of(values), reciprocal = reciprocal_of(largest);
  encode_block(values, codes, [&](float value) {
    return std::max(table.nearest(value * reciprocal), static_cast<int32_t>(value > 0));
  });
  return reciprocal == 0 ? 0 : largest;
}

BITWRIGHT_VECTORIZED
void decode_block(const float* values, const uint8_t* codes, float scale, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = values[codes[i]] * scale;
}

BITWRIGHT_VECTORIZED
void update(const AdamWStep& step, float* first, float* second, std::span<float> change) {
  const AdamWStep s = step;  // on the stack, where nothing that is written can be it
  for (size_t i = 0; i < change.size(); ++i) {
    const float gradient = change[i] * s.gradient_scale;
    const float m = first[i] * s.beta1 + gradient * s.one_less_beta1;
    const float v = second[i] * s.beta2 + gradient * gradient * s.one_less_beta2;
    first[i] = m;
    second[i] = v;
    change[i] = -(s.rate * m / (std::sqrt(v) * s.root_factor + s.epsilon));
  }
}

BITWRIGHT_VECTORIZED
void add_changes(float decay, std::span<const float> change, float* weight) {
  for (size_t i = 0; i < change.size(); ++i) weight[i] += change[i] - decay * weight[i];
}

}  // namespace

AdamWStep AdamWStep::make(double lr, double beta1, double beta2, double epsilon, double weight_decay, int64_t step,
                          double gradient_scale) {
  const auto count = static_cast<double>(step);
  return {.beta1 = static_cast<float>(beta1),
          .beta2 = static_cast<float>(beta2),
          .one_less_beta1 = static_cast<float>(1 - beta1),
          .one_less_beta2 = static_cast<float>(1 - beta2),
          .rate = static_cast<float>(lr / (1 - std::pow(beta1, count))),
          .root_factor = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, count))),
          .epsilon = static_cast<float>(epsilon),
          .decay = static_cast<float>(lr * weight_decay),
          .gradient_scale = static_cast<float>(gradient_scale)};
}

void adamw_changes(const AdamWStep& step, const Moments32& moments, std::span<float> change) {
  update(step, moments.first, moments.second, change);
}

void adamw_changes(const AdamWStep& step, const Moments8& moments, std::span<float> change) {
  std::array<float, kMomentBlock> first, second;
  for (size_t begin = 0, block = 0; begin < change.size(); begin += kMomentBlock, ++block) {
    const size_t count = std::min(kMomentBlock, change.size() - begin);
    const std::span m = std::span(first).first(count), v = std::span(second).first(count);
    const Moments8 at = moments.from_block(block);
    decode_signed(at.first, *at.first_scale, m);
    decode_unsigned(at.second, *at.second_scale, v);
    update(step, m.data(), v.data(), change.subspan(begin, count));
    *at.first_scale = encode_signed(m, at.first);
    *at.second_scale = encode_unsigned(v, at.second);
  }
}

void apply_changes(const AdamWStep& step, std::span<const float> change, float* weight) {
  add_changes(step.decay, change, weight);
}

float encode_signed(std::span<const float> values, uint8_t* codes) {
  return encode_signed_block(maps().signed_magnitudes, values, codes);
}
float encode_unsigned(std::span<const float> values, uint8_t* codes) {
  return encode_unsigned_block(maps().unsigned_magnitudes, values, codes);
}
void decode_signed(const uint8_t* codes, float scale, std::span<float> out) {
  decode_block(maps().signed_values.data(), codes, scale, out);
}
void decode_unsigned(const uint8_t* codes, float scale, std::span<float> out) {
  decode_block(maps().unsigned_values.data(), codes, scale, out);
}

}  // namespace bitwright
