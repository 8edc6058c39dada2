#include "container/awq_rounding.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on
constexpr float kMost = 15, kLeastRange = 1e-5f;
constexpr float kBeyond = 60000;  ///< more than any code, less than f16's infinity

struct Group {
  float scale, zero;
};

Group choose(std::span<const float> values, DType arithmetic) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  const auto rounded = [arithmetic](float value) { return round_to(arithmetic, value); };
  const float range = rounded(std::max(rounded(*high - *low), kLeastRange));
  const float scale = rounded(range / kMost);
  if (!std::isfinite(scale)) throw_scale_overflow(*high - *low, info(arithmetic).name);
  return {scale, std::clamp(-std::nearbyint(rounded(*low / scale)), 0.0f, kMost) + 0.0f};
}

/// To f16's 11 bits, of magnitudes from 2^-14 to kBeyond; smaller ones stay smaller than any that rounds to 1.
float rounded_to_half(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  constexpr uint32_t kDropped = 13;
  return std::bit_cast<float>((bits + (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1)) & ~((1u << kDropped) - 1));
}

/// The codes that packing recovers from the rounded values are these: an error of f16 is far less than half a code.
template <bool half>
void encode_group(std::span<const float> values, const Group& group, std::byte* codes) {
  for (size_t i = 0; i < values.size(); ++i) {
    float scaled = std::min(std::max(values[i] / group.scale, -kBeyond), kBeyond);
    if constexpr (half) scaled = rounded_to_half(scaled);
    // Adding and taking off 1.5 * 2^23 rounds to an integer, ties to even.
    const float rounded = scaled + RangeSearch::kRound - RangeSearch::kRound;
    const float code = std::min(std::max(rounded + group.zero, 0.0f), kMost);
    codes[i] = static_cast<std::byte>(static_cast<uint8_t>(static_cast<int32_t>(code)));
  }
}

}  // namespace

QuantizedTensor encode_awq_in(DType arithmetic, const Scheme& scheme, const Shape& shape, WeightView weight) {
  const auto rows = static_cast<size_t>(shape[0]), columns = static_cast<size_t>(shape[1]);
  const Grouping& grouping = scheme.scale->grouping;
  const size_t size = grouping.size == 0 ? std::max<size_t>(columns, 1) : static_cast<size_t>(grouping.size);
  BW_ASSERT(grouping.kind == Grouping::Kind::axis && columns % size == 0 && weight.count() == rows * columns);
  const size_t in_row = columns / size, width = size_bytes(weight.dtype);
  std::vector<float> scales(rows * in_row);
  std::vector<std::byte> zeros(scales.size());
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(rows * columns)};
  const auto encode = arithmetic == DType::f16 ? encode_group<true> : encode_group<false>;
  parallel_ranges(rows, std::max<size_t>(kChunk / std::max<size_t>(columns, 1), 1), [&](size_t begin, size_t end) {
    std::vector<float> values(columns);
    std::vector<std::byte> narrow(columns * size_bytes(arithmetic));
    for (size_t row = begin; row < end; ++row) {
      to_f32(weight.dtype, weight.bytes.subspan(row * columns * width, columns * width), values);
      if (arithmetic != weight.dtype) {
        from_f32(arithmetic, values, narrow);
        to_f32(arithmetic, narrow, values);
      }
      for (size_t k = 0; k < columns; ++k)
        if (!std::isfinite(values[k])) throw_not_finite(static_cast<int64_t>(row * columns + k), values[k]);
      for (size_t g = 0; g < in_row; ++g) {
        const auto part = std::span<const float>(values).subspan(g * size, size);
        const Group group = choose(part, arithmetic);
        encode(part, group, &t.codes[row * columns + g * size]);
        scales[row * in_row + g] = group.scale;
        zeros[row * in_row + g] = static_cast<std::byte>(static_cast<uint8_t>(group.zero));
      }
    }
  });
  for (const float scale : scales)
    if (!std::isfinite(round_to(DType::f16, scale))) throw_scale_overflow(scale, info(DType::f16).name);
  QuantizedTensor stored = {.scheme = *scheme.scale->scheme, .shape = parameter_shape(grouping, shape)};
  stored.codes.resize(scales.size() * size_bytes(DType::f16));
  from_f32(DType::f16, scales, stored.codes);
  t.scale = std::make_shared<const QuantizedTensor>(std::move(stored));
  t.offset = std::make_shared<const QuantizedTensor>(QuantizedTensor{
      .scheme = *scheme.offset->scheme, .shape = parameter_shape(grouping, shape), .codes = std::move(zeros)});
  return t;
}

QuantizedTensor encode_awq(const Scheme& scheme, const Shape& shape, WeightView weight) {
  return encode_awq_in(DType::f16, scheme, shape, weight);
}

}  // namespace bitwright
