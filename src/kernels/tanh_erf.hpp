#pragma once

#include <cmath>
#include <cstddef>

#include "kernels/exponential.hpp"

namespace bitwright {

// By the polynomials of Cephes tanhf and erff (S. L. Moshier, netlib.org/cephes/single). As with exponential():
// products and sums only, never fused, in a fixed order, so that elementwise-inl.hpp gives the same bits.

template <size_t n>
float polynomial(float z, const float (&coefficients)[n]) {
  float p = coefficients[0];
  for (size_t i = 1; i < n; ++i) p = p * z + coefficients[i];
  return p;
}

struct Tanh {
  static constexpr float kSmall = 0.625f;  ///< below: x + x^3 p(x^2), above: 1 - 2 / (e^2x + 1)
  static constexpr float kCoefficients[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                            1.33314422036e-1f, -3.33332819422e-1f};
};

/// tanh(x) within 4 ulp; NaN stays NaN.
inline float hyperbolic_tangent(float x) {
  const float a = std::abs(x), z = x * x;
  if (a < Tanh::kSmall) return polynomial(z, Tanh::kCoefficients) * z * x + x;
  return std::copysign(1 - 2 / (exponential(2 * a) + 1), x);
}

struct Erf {
  /// erf(x) = x p(x^2) for |x| < 1.
  static constexpr float kSmall[] = {7.853861353153693e-5f,  -8.010193625184903e-4f, 5.188327685732524e-3f,
                                     -2.685381193529856e-2f, 1.128358514861418e-1f,  -3.761262582423300e-1f,
                                     1.128379165726710e0f};
  /// erf(x) = 1 - e^(-x^2) / x q(1 / x^2) for 1 <= x < 2, and from 2 on.
  static constexpr float kMiddle[] = {2.326819970068386e-2f,  -1.387039388740657e-1f, 3.687424674597105e-1f,
                                      -5.824733027278666e-1f, 6.210004621745983e-1f,  -4.944515323274145e-1f,
                                      3.404879937665872e-1f,  -2.741127028184656e-1f, 5.638259427386472e-1f};
  static constexpr float kLarge[] = {-1.047766399936249e1f,  1.297719955372516e1f,  -7.495518717768503e0f,
                                     2.921019019210786e0f,   -1.015265279202700e0f, 4.218463358204948e-1f,
                                     -2.820767439740514e-1f, 5.641895067754075e-1f};
};

/// The error function within 2e-7; NaN stays NaN.
inline float error_function(float x) {
  const float a = std::abs(x);
  if (a < 1) return x * polynomial(x * x, Erf::kSmall);
  const float r = 1 / a, y = r * r;
  const float q = a < 2 ? polynomial(y, Erf::kMiddle) : polynomial(y, Erf::kLarge);
  return std::copysign(1 - exponential(-(a * a)) * r * q, x);
}

struct Gelu {
  static constexpr float kSqrtHalf = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f, kCubic = 0.044715f;
  static constexpr float kSqrtHalfOverPi = 0.39894228040143268f;  ///< 1 / sqrt(2 pi)
  static constexpr float kFar = 16;                               ///< from here on the slope is 0 or 1
};

}  // namespace bitwright
