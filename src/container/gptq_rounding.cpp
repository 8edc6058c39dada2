#include "container/gptq_rounding.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on

struct Group {
  float scale, zero;
};

Group choose(std::span<const float> values, bool symmetric, int bits) {
  float low = 0, high = 0;
  for (const float value : values) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (symmetric) {
    high = std::max(-low, high);
    if (low < 0) low = -high;
  }
  if (low == 0 && high == 0) {
    low = -1;
    high = 1;
  }
  const auto most = static_cast<float>((1 << bits) - 1);
  const float scale = (high - low) / most;
  if (!std::isfinite(scale)) throw_scale_overflow(scale, "float32");
  return {scale, symmetric ? static_cast<float>(1 << (bits - 1)) : std::nearbyint(-low / scale)};
}

/// codes: with the zero point added, or taken off again for signed ones.
void encode_group(std::span<const float> values, const Group& group, bool symmetric, int bits, std::byte* codes) {
  const auto most = static_cast<float>((1 << bits) - 1);
  const auto sign = static_cast<uint8_t>(symmetric ? 1 << (bits - 1) : 0);
  for (size_t i = 0; i < values.size(); ++i) {
    // Adding and taking off 1.5 * 2^23 rounds to an integer, ties to even.
    const float rounded = values[i] / group.scale + RangeSearch::kRound - RangeSearch::kRound;
    const float code = std::min(std::max(rounded + group.zero, 0.0f), most);
    codes[i] = static_cast<std::byte>(static_cast<uint8_t>(static_cast<int32_t>(code)) ^ sign);
  }
}

/// Where values and range are so small that the scale is 0, all codes stand for 0.
void encode_nothing(const Group& group, bool symmetric, std::span<std::byte> codes) {
  std::ranges::fill(codes, symmetric ? std::byte{0} : static_cast<std::byte>(static_cast<uint8_t>(group.zero)));
}

}  // namespace

QuantizedTensor encode_gptq(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const bool symmetric = scheme.offset_kind == OffsetKind::none;
  const int bits = scheme.element->bits;
  const auto rows = static_cast<size_t>(shape[0]), columns = static_cast<size_t>(shape[1]);
  BW_ASSERT(scheme.scale->grouping.kind == Grouping::Kind::axis && weight.count() == rows * columns);
  const size_t size = scheme.scale->grouping.size == 0 ? std::max<size_t>(columns, 1)
                                                       : static_cast<size_t>(scheme.scale->grouping.size);
  const size_t in_row = (columns + size - 1) / size, width = size_bytes(weight.dtype);
  std::vector<float> scales(rows * in_row);
  std::vector<std::byte> zeros(symmetric ? 0 : scales.size());
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(rows * columns)};
  const auto encode_row = [&](size_t row, std::span<const float> values) {
    for (size_t g = 0; g < in_row; ++g) {
      const size_t begin = g * size, count = std::min(size, columns - begin), at = row * in_row + g;
      Group group = choose(values.subspan(begin, count), symmetric, bits);
      if (!(group.scale > 0)) group.zero = static_cast<float>(1 << (bits - 1));
      std::byte* const codes = &t.codes[row * columns + begin];
      if (group.scale > 0)
        encode_group(values.subspan(begin, count), group, symmetric, bits, codes);
      else
        encode_nothing(group, symmetric, {codes, count});
      scales[at] = group.scale;
      if (!symmetric) zeros[at] = static_cast<std::byte>(static_cast<uint8_t>(group.zero));
    }
  };
  parallel_ranges(rows, std::max<size_t>(kChunk / std::max<size_t>(columns, 1), 1), [&](size_t begin, size_t end) {
    std::vector<float> values(columns);
    for (size_t row = begin; row < end; ++row) {
      to_f32(weight.dtype, weight.bytes.subspan(row * columns * width, columns * width), values);
      for (size_t k = 0; k < columns; ++k)
        if (!std::isfinite(values[k])) throw_not_finite(static_cast<int64_t>(row * columns + k), values[k]);
      encode_row(row, values);
    }
  });
  const Parameter& p = *scheme.scale;
  const DType dtype = *dtype_of(*p.scheme->element);
  for (const float scale : scales)
    if (!std::isfinite(round_to(dtype, scale))) throw_scale_overflow(scale, info(dtype).name);
  QuantizedTensor stored = {.scheme = *p.scheme, .shape = parameter_shape(p.grouping, shape)};
  stored.codes.resize(scales.size() * size_bytes(dtype));
  from_f32(dtype, scales, stored.codes);
  t.scale = std::make_shared<const QuantizedTensor>(std::move(stored));
  if (!symmetric)
    t.offset = std::make_shared<const QuantizedTensor>(QuantizedTensor{
        .scheme = *scheme.offset->scheme, .shape = parameter_shape(p.grouping, shape), .codes = std::move(zeros)});
  return t;
}

}  // namespace bitwright
