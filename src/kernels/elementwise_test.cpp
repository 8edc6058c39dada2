#include "kernels/elementwise.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/exponential.hpp"
#include "kernels/kernel_level.hpp"
#include "kernels/tanh_erf.hpp"

namespace bitwright {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(KernelsExponential, WithinTwoUlp) {
  constexpr uint32_t kStride = 257;  // through all bit patterns, every exponent and sign
  double worst = 0;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += kStride) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (std::isnan(x)) continue;
    const float y = exponential(x);
    const double exact = std::exp(double{x});
    if (exact > double{std::numeric_limits<float>::max()} * (1 + 1e-7)) {
      ASSERT_EQ(y, kInfinity) << x;
    } else {
      const int exponent = exact > 0 ? std::max(std::ilogb(exact), -126) : -126;
      const double ulps = std::abs(double{y} - exact) / std::ldexp(1.0, exponent - 23);
      worst = std::max(worst, ulps);
      ASSERT_LE(ulps, 2) << x << ": " << y << " where e^x is " << exact;
    }
  }
  RecordProperty("worst_ulp", std::to_string(worst));
}

TEST(KernelsExponential, Special) {
  EXPECT_EQ(exponential(0.0f), 1.0f);
  EXPECT_EQ(exponential(-0.0f), 1.0f);
  EXPECT_EQ(exponential(kInfinity), kInfinity);
  EXPECT_EQ(exponential(-kInfinity), 0.0f);
  EXPECT_TRUE(std::isnan(exponential(std::numeric_limits<float>::quiet_NaN())));
}

TEST(KernelsElementwise, RmsNorm) {
  for (const size_t n : {1, 7, 16, 33, 64}) {
    std::vector<float> x(n), weight(n), out(n);
    std::iota(x.begin(), x.end(), -3.0f);
    std::iota(weight.begin(), weight.end(), 0.5f);
    rms_norm(x, weight, 1e-5f, out.data());
    double squares = 0;
    for (const float v : x) squares += double{v} * double{v};
    for (size_t i = 0; i < n; ++i) {
      const double expected =
          double{x[i]} / std::sqrt(squares / static_cast<double>(n) + double{1e-5f}) * double{weight[i]};
      EXPECT_NEAR(double{out[i]}, expected, 1e-6 * (1 + std::abs(expected)));
    }
  }
}

TEST(KernelsElementwise, LayerNorm) {
  for (const size_t n : {1, 7, 16, 33, 64}) {
    std::vector<float> x(n), weight(n), bias(n), out(n);
    std::iota(x.begin(), x.end(), 100.0f);  // far from zero: the mean must be taken off before squaring
    std::iota(weight.begin(), weight.end(), 0.5f);
    std::iota(bias.begin(), bias.end(), -2.0f);
    layer_norm(x, weight, bias, 1e-5f, out.data());
    double mean = 0, squares = 0;
    for (const float v : x) mean += double{v} / static_cast<double>(n);
    for (const float v : x) squares += (double{v} - mean) * (double{v} - mean);
    for (size_t i = 0; i < n; ++i) {
      const double expected =
          (double{x[i]} - mean) / std::sqrt(squares / static_cast<double>(n) + double{1e-5f}) * double{weight[i]} +
          double{bias[i]};
      EXPECT_NEAR(double{out[i]}, expected, 1e-6 * (1 + std::abs(expected)));
    }
  }
}

/// Both signs of every magnitude below `most`, evenly among the bit patterns.
template <class Check>
void for_magnitudes(float most, Check check) {
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(most); bits += 997)
    for (const float sign : {1.0f, -1.0f}) check(sign * std::bit_cast<float>(bits));
}

TEST(KernelsElementwise, TanhAndErf) {
  double worst_tanh = 0, worst_erf = 0;
  for_magnitudes(20, [&](float x) {
    const double tanh = std::tanh(double{x}), erf = std::erf(double{x});
    if (std::abs(x) > 1e-30f)
      worst_tanh = std::max(worst_tanh, std::abs(double{hyperbolic_tangent(x)} - tanh) / std::abs(tanh));
    worst_erf = std::max(worst_erf, std::abs(double{error_function(x)} - erf));
  });
  EXPECT_LE(worst_tanh, 2.4e-7);
  EXPECT_LE(worst_erf, 2e-7);
  EXPECT_EQ(hyperbolic_tangent(-kInfinity), -1);
  EXPECT_EQ(error_function(kInfinity), 1);
  EXPECT_TRUE(std::isnan(hyperbolic_tangent(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_TRUE(std::isnan(error_function(std::numeric_limits<float>::quiet_NaN())));
}

double exact(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  }
  return 0;
}

constexpr Activation kActivations[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh};

TEST(KernelsElementwise, Activations) {
  for (const Activation activation : kActivations)
    for_magnitudes(200, [&](float x) {
      float plain = x, multiplied = x;
      const float factor = 3;
      activate(activation, &plain, nullptr, 1);
      activate(activation, &multiplied, &factor, 1);
      const double expected = exact(activation, double{x});
      ASSERT_NEAR(double{plain}, expected, 4e-7 * std::max(1.0, std::abs(double{x}))) << x;
      ASSERT_EQ(multiplied, plain * factor);
    });
}

double exact_slope(Activation activation, double x) {
  const double root = std::sqrt(2 / std::acos(-1.0));
  switch (activation) {
    case Activation::silu: {
      const double s = 1 / (1 + std::exp(-x));
      return s + x * s * (1 - s);
    }
    case Activation::gelu:
      return 0.5 * (1 + std::erf(x / std::sqrt(2.0))) + x * root / 2 * std::exp(-x * x / 2);
    case Activation::gelu_tanh: {
      const double t = std::tanh(root * (x + 0.044715 * x * x * x));
      return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x);
    }
  }
  return 0;
}

TEST(KernelsElementwise, ActivationSlopes) {
  for (const Activation activation : kActivations) {
    for_magnitudes(80, [&](float x) {
      float slope = x;
      activation_slope(activation, &slope, 1);
      ASSERT_NEAR(double{slope}, exact_slope(activation, double{x}), 2e-6) << x;
    });
    for (const float x : {1e4f, std::numeric_limits<float>::max()}) {
      float ends[] = {x, -x};
      activation_slope(activation, ends, 2);
      EXPECT_EQ(ends[0], 1);
      EXPECT_EQ(ends[1], 0);
    }
  }
}

TEST(KernelsElementwise, SoftCap) {
  std::vector<float> x = {-1000, -3, 0, 0.1f, 7, 1e9f};
  const std::vector<float> before = x;
  soft_cap(x.data(), x.size(), 0.5f, 4);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(double{x[i]}, 4 * std::tanh(double{before[i]} * 0.5 / 4), 1e-6);
}

TEST(KernelsElementwise, SoftmaxTerms) {
  std::vector<float> scores(37);
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i * 7 % 37) * 100;
  const float reciprocal = softmax_terms(scores.data(), scores.size(), 0.01f);
  float sum = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    EXPECT_NEAR(scores[i], std::exp(static_cast<float>(i * 7 % 37) - 36), 1e-6f);
    sum += scores[i] * reciprocal;
  }
  EXPECT_NEAR(sum, 1, 1e-6f);
}

TEST(KernelsElementwise, SameBitsOnEveryLevel) {
  std::vector<float> values;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 999'983) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (!std::isnan(x)) values.push_back(x);
  }
  const std::vector<float> up(values.size(), 0.75f);
  std::vector<float> terms(301);
  for (size_t i = 0; i < terms.size(); ++i) terms[i] = static_cast<float>(i * 7919 % 1000) / 50 - 15;
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable()) continue;
    for (const size_t count : {size_t{1}, size_t{15}, size_t{16}, size_t{23}, size_t{24}, size_t{301}, values.size()}) {
      const std::vector<float> some(values.end() - static_cast<std::ptrdiff_t>(count), values.end());
      for (const Activation activation : kActivations)
        for (const float* const factor : {up.data(), static_cast<const float*>(nullptr)}) {
          std::vector<float> expected = some, y = some;
          activate(activation, expected.data(), factor, count);
          level.activate(activation, y.data(), factor, count);
          EXPECT_EQ(std::memcmp(y.data(), expected.data(), count * sizeof(float)), 0) << level.name << ", " << count;
        }
      for (const Activation activation : kActivations) {
        std::vector<float> expected = some, y = some;
        activation_slope(activation, expected.data(), count);
        level.activation_slope(activation, y.data(), count);
        EXPECT_EQ(std::memcmp(y.data(), expected.data(), count * sizeof(float)), 0) << level.name << ", " << count;
      }
      std::vector<float> expected = some, y = some;
      soft_cap(expected.data(), count, 0.3f, 30);
      level.soft_cap(y.data(), count, 0.3f, 30);
      EXPECT_EQ(std::memcmp(y.data(), expected.data(), count * sizeof(float)), 0) << level.name << ", " << count;
    }
    for (const size_t count : {1, 15, 16, 23, 24, 300}) {
      std::vector<float> expected = terms, y = terms;
      EXPECT_EQ(level.softmax_terms(y.data(), count, 0.7f), softmax_terms(expected.data(), count, 0.7f)) << level.name;
      EXPECT_EQ(y, expected) << level.name << ", " << count;  // what stands behind has not changed
    }
  }
}

TEST(KernelsElementwise, Products) {
  std::vector<float> x = {1, -2, 3};
  multiply(x, std::vector<float>{2, 3, 0.5f}.data());
  EXPECT_EQ(x, (std::vector<float>{2, -6, 1.5f}));
}

TEST(KernelsElementwise, RotateHalves) {
  std::vector<float> x = {1, 2, 3, 4};
  const std::vector<float> cosine = {0, 0.6f}, sine = {1, 0.8f};
  rotate_halves(x.data(), cosine, sine.data());
  EXPECT_EQ(x, (std::vector<float>{-3, 2 * 0.6f - 4 * 0.8f, 1, 4 * 0.6f + 2 * 0.8f}));
}

}  // namespace
}  // namespace bitwright
