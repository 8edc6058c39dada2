#include "container/float_rounding.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <utility>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/row_groups.hpp"
#include "container/small_floats.hpp"
#include "container/stored_arrays.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr float kLargestE4m3 = 448, kLargestE2m1 = 6;

/// use(values, group, first element): each segment of each row.
template <class Use>
void for_each_segment(const RowGroups& groups, WeightView weight, const Use& use) {
  for_each_row(groups, weight, [&](int64_t row, std::span<const float> values) {
    for (int64_t s = 0; s < groups.segments(); ++s) {
      const auto begin = static_cast<size_t>(s * groups.length());
      const size_t length = std::min(static_cast<size_t>(groups.length()), values.size() - begin);
      use(values.subspan(begin, length), static_cast<size_t>(groups.group_of(row, s)),
          static_cast<size_t>(row * groups.columns()) + begin);
    }
  });
}

template <DType dtype, bool divides>
void to_e4m3_codes(std::span<const float> values, float by, std::byte* codes) {
  for (size_t i = 0; i < values.size(); ++i) {
    const float scaled = rounded<dtype>(divides ? values[i] / by : values[i] * by);
    codes[i] = static_cast<std::byte>(to_e4m3(scaled));
  }
}

template <DType dtype>
void to_e4m3_codes(std::span<const float> values, float by, bool divides, std::byte* codes) {
  divides ? to_e4m3_codes<dtype, true>(values, by, codes) : to_e4m3_codes<dtype, false>(values, by, codes);
}

}  // namespace

QuantizedTensor encode_fp8(const Scheme& scheme, const Shape& shape, WeightView weight, const Fp8Rule& rule) {
  const RowGroups groups(scheme.scale->grouping, shape);
  const Scheme& stored = *scheme.scale->scheme;
  std::vector<float> by = largest_magnitudes(groups, weight), scales(by.size());
  bool divides = rule.divides;
  for (size_t g = 0; g < by.size(); ++g) {
    const Fp8Rule::Scale scale = rule.scale(by[g], weight.dtype);
    by[g] = scale.by;
    scales[g] = scale.stored;
  }
  if (stored != plain(DType::f32)) {
    divides = true;
    for (size_t g = 0; g < by.size(); ++g) {
      by[g] = round_to(*dtype_of(*stored.element), scales[g]);
      if (!std::isfinite(by[g]) || by[g] == 0) throw_scale_overflow(scales[g], stored.element->name);
    }
  }
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(weight.count())};
  const DType dtype = rule.in_weight_type ? weight.dtype : DType::f32;
  for_each_segment(groups, weight, [&](std::span<const float> values, size_t group, size_t first) {
    std::byte* const codes = &t.codes[first];
    if (dtype == DType::bf16)
      to_e4m3_codes<DType::bf16>(values, by[group], divides, codes);
    else if (dtype == DType::f16)
      to_e4m3_codes<DType::f16>(values, by[group], divides, codes);
    else
      to_e4m3_codes<DType::f32>(values, by[group], divides, codes);
  });
  const auto scale = numbers(stored, parameter_shape(scheme.scale->grouping, shape), {});
  scale->codes.resize(scales.size() * stored.element->code_bytes());
  from_f32(*dtype_of(*stored.element), scales, scale->codes);
  t.scale = scale;
  return t;
}

namespace {

/// What 0 in all of a tensor is divided by.
float nvfp4_scale_2(float largest) {
  const float scale = largest / (kLargestE2m1 * kLargestE4m3);
  return scale > 0 ? scale : 1;
}

uint8_t nvfp4_scale(float largest, float scale_2) {
  constexpr float kLeast = 0x1p-9f;
  const float scale = largest / (kLargestE2m1 * scale_2);
  return to_e4m3(scale == 0 ? 1.0f : std::clamp(scale, kLeast, kLargestE4m3));
}

}  // namespace

QuantizedTensor encode_nvfp4(const Scheme& scheme, const Shape& shape, WeightView weight, float largest) {
  const RowGroups groups(scheme.scale->grouping, shape);
  std::vector<float> by = largest_magnitudes(groups, weight);
  const Scheme& stored = *scheme.scale->scheme;
  const Shape group_shape = parameter_shape(scheme.scale->grouping, shape);
  const auto scale = numbers(stored, group_shape, {});
  // One for each matrix of a stack.
  const auto matrices = static_cast<size_t>(element_count(parameter_shape(stored.scale->grouping, group_shape)));
  const size_t each = matrices == 0 ? 0 : by.size() / matrices;
  std::vector<float> scales_2(matrices);
  scale->codes.resize(by.size());
  for (size_t m = 0; m < matrices; ++m) {
    const auto part = std::span(by).subspan(m * each, each);
    scales_2[m] = nvfp4_scale_2(std::max(largest, part.empty() ? 0 : *std::ranges::max_element(part)));
    for (size_t g = m * each; g < (m + 1) * each; ++g) {
      const uint8_t code = nvfp4_scale(by[g], scales_2[m]);
      scale->codes[g] = static_cast<std::byte>(code);
      by[g] = e4m3_to_f32(code) * scales_2[m];
    }
  }
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(weight.count())};
  for_each_segment(groups, weight, [&](std::span<const float> values, size_t group, size_t first) {
    // A scale of 0 is that of a tensor whose largest value is next to nothing.
    const float divisor = by[group] == 0 ? 1 : by[group];
    std::byte* const codes = &t.codes[first];
    for (size_t i = 0; i < values.size(); ++i) {
      const float scaled = values[i] / divisor;
      codes[i] = static_cast<std::byte>(to_e2m1_magnitude(std::fabs(scaled)) | (scaled < 0 ? 8 : 0));
    }
  });
  scale->scale = numbers(*stored.scale->scheme, parameter_shape(stored.scale->grouping, group_shape),
                         std::as_bytes(std::span(scales_2)));
  t.scale = scale;
  return t;
}

namespace {

/// The exponent's byte of the least power of two that is not below largest / 6.
uint8_t mxfp4_scale(float largest) {
  constexpr uint32_t kJustBelowOne = 0x7fffffu;
  return static_cast<uint8_t>((std::bit_cast<uint32_t>(largest / kLargestE2m1) + kJustBelowOne) >> 23);
}

}  // namespace

QuantizedTensor encode_mxfp4_columns(const Scheme& scheme, const Shape& shape, WeightView weight) {
  constexpr int64_t kGroup = 32;
  BW_ASSERT(shape.size() >= 2 && shape[shape.size() - 2] % kGroup == 0);
  // 32 rows of one matrix are a row of groups.
  const auto columns = static_cast<size_t>(shape.back());
  const RowGroups rows(Grouping::channel(), shape);
  largest_magnitudes(rows, weight);  // finds what is not finite
  const auto scale = numbers(*scheme.scale->scheme, parameter_shape(scheme.scale->grouping, shape), {});
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(weight.count())};
  scale->codes.resize(weight.count() / kGroup);
  parallel_ranges(static_cast<size_t>(rows.rows() / kGroup), 1, [&](size_t begin, size_t end) {
    std::vector<float> values(kGroup * columns), by(columns);
    for (size_t stretch = begin; stretch < end; ++stretch) {
      const size_t bytes = values.size() * size_bytes(weight.dtype);
      to_f32(weight.dtype, weight.bytes.subspan(stretch * bytes, bytes), values);
      std::ranges::fill(by, 0.0f);
      for (size_t k = 0; k < kGroup; ++k)
        for (size_t c = 0; c < columns; ++c) {
          const float magnitude = std::fabs(values[k * columns + c]);
          by[c] = magnitude > by[c] ? magnitude : by[c];
        }
      for (size_t c = 0; c < columns; ++c) {
        const uint8_t code = mxfp4_scale(by[c]);
        scale->codes[stretch * columns + c] = static_cast<std::byte>(code);
        by[c] = code == 0 ? 0.0f : 1.0f / e8m0_to_f32(code);
      }
      std::byte* const codes = &t.codes[stretch * values.size()];
      for (size_t k = 0; k < kGroup; ++k)
        for (size_t c = 0; c < columns; ++c) {
          const float scaled = values[k * columns + c] * by[c];
          const int sign = std::bit_cast<int32_t>(scaled) >> 28 & 8;
          codes[k * columns + c] = static_cast<std::byte>(to_e2m1_magnitude(std::fabs(scaled)) | sign);
        }
    }
  });
  t.scale = scale;
  return t;
}

}  // namespace bitwright
