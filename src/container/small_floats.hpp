#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/dtype.hpp"

namespace bitwright {

// Rounding to few bits, without branches, for loops over weights.

/// The result of one operation as a tensor of this type would hold it; finite.
template <DType dtype>
float rounded(float value) {
  if constexpr (dtype == DType::bf16) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
  } else if constexpr (dtype == DType::f16) {
    return f16_to_f32(f32_to_f16(value));
  } else {
    return value;
  }
}

/// e4m3, ties to even, beyond 448 to 448.
inline uint8_t to_e4m3(float value) {
  // Signed, because SSE2 compares no other integers.
  const auto bits = std::bit_cast<int32_t>(value);
  constexpr int32_t kTop = 0x43e00000;  // 448
  const int32_t magnitude = std::min(bits & 0x7fffffff, kTop);
  constexpr int32_t kBias = (127 - 7) << 3, kSmallestNormal = 0x3c800000;  // 2^-6
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  const int32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - kBias;
  const int32_t subnormal = std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) * 512.0f + kRound) & 0xff;
  const int32_t small = -static_cast<int32_t>(magnitude < kSmallestNormal);  // a mask: a choice would be a branch
  return static_cast<uint8_t>((subnormal & small) | (normal & ~small) | (bits >> 24 & 0x80));
}

/// The magnitude's code in float4_e2m1, ties to even, beyond 6 to 6: without the sign.
inline uint8_t to_e2m1_magnitude(float magnitude) {
  const float m = magnitude;
  const int code = (m > 0.25f ? 1 : 0) + (m >= 0.75f ? 1 : 0) + (m > 1.25f ? 1 : 0) + (m >= 1.75f ? 1 : 0) +
                   (m > 2.5f ? 1 : 0) + (m >= 3.5f ? 1 : 0) + (m > 5.0f ? 1 : 0);
  return static_cast<uint8_t>(code);
}

}  // namespace bitwright
