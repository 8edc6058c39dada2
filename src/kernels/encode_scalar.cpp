#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/encode.hpp"

namespace bitwright {
namespace {

std::vector<float> widen(DType dtype, const std::byte* values, size_t count) {
  std::vector<float> wide(count);
  to_f32(dtype, {values, count * size_bytes(dtype)}, wide);
  return wide;
}

bool all_finite(std::span<const float> values) {
  return std::ranges::all_of(values, [](float v) { return std::isfinite(v); });
}

void encode_each(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                 const float* scales, const float* zeros, std::byte* codes) {
  const std::vector<float> wide = widen(dtype, values, size * groups);
  for (size_t i = 0; i < wide.size(); ++i) {
    const GroupParameters p = {.scale = scales[i / size], .offset = zeros == nullptr ? 0 : zeros[i / size]};
    codes[i] = static_cast<std::byte>(encode_value(*e.scheme, p, wide[i]));
  }
}

}  // namespace

bool find_extremes(DType dtype, const std::byte* values, size_t count, Range& range) {
  const std::vector<float> wide = widen(dtype, values, count);
  range = min_max_range({}, wide);
  return all_finite(wide);
}

bool search_ranges(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                   float* /*scratch*/, Range* ranges) {
  for (size_t g = 0; g < groups; ++g) {
    const std::vector<float> wide = widen(dtype, values + g * size * size_bytes(dtype), size);
    if (!all_finite(wide)) return false;
    ranges[g] = least_squares_range(*e.scheme, wide);
  }
  return true;
}

void group_parameters(const GroupEncoding& e, const Range* ranges, size_t groups, float* scales, float* zeros) {
  for (size_t g = 0; g < groups; ++g) {
    scales[g] = round_to(*e.scale_dtype, ideal_scale(*e.scheme, ranges[g]));
    zeros[g] = e.has_zero ? zero_point(*e.scheme, scales[g], ranges[g]) : 0;
  }
}

void encode_integers(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                     const float* scales, const float* zeros, std::byte* codes) {
  encode_each(e, dtype, values, size, groups, scales, zeros, codes);
}

void encode_table(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                  const float* scales, std::byte* codes) {
  encode_each(e, dtype, values, size, groups, scales, nullptr, codes);
}

}  // namespace bitwright
