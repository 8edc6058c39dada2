#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace bitwright {

/// e^x = 2^n e^r with x = n ln 2 + r, |r| <= ln 2 / 2; e^r by the polynomial of Cephes expf (S. L. Moshier,
/// netlib.org/cephes/single).
struct Exponential {
  static constexpr float kLowest = -104, kHighest = 89;  // beyond: 0 and infinity
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kRounder = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  static constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                            4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

/// e^x within 2 ulp, infinity and denormals included; NaN stays NaN. Products and sums only, never fused, in a fixed
/// order, so that elementwise-inl.hpp gives the same bits.
inline float exponential(float x) {
  using E = Exponential;
  const float clamped = std::min(std::max(x, E::kLowest), E::kHighest);
  const float shifted = clamped * E::kLog2E + E::kRounder;
  const float n = shifted - E::kRounder;
  const float r = clamped - n * E::kLn2High - n * E::kLn2Low;
  float p = 0;
  for (const float coefficient : E::kCoefficients) p = p * r + coefficient;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, each a normal number, so that only the last product rounds.
  const auto exponent = static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(E::kRounder));
  const int32_t half = exponent >> 1;
  const auto power = [](int32_t e) { return std::bit_cast<float>((static_cast<uint32_t>(e) + 127u) << 23); };
  return p * power(half) * power(exponent - half);
}

}  // namespace bitwright
