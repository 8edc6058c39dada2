#include "kernels/requantize.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/threads.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

struct Case {
  const char* name;
  int bits;
  Grouping grouping;
  DType scales;
  bool zero_point = false;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

Scheme scheme_of(const Case& c) {
  const ElementType& element = integer_element(c.bits, !c.zero_point);
  Scheme scheme = {.element = &element, .scale = parameter(c.grouping, plain(c.scales))};
  if (c.zero_point) {
    scheme.offset_kind = OffsetKind::zero_point;
    scheme.offset = parameter(c.grouping, Scheme{.element = &element});
  }
  return scheme;
}

std::vector<float> normal(size_t count, float deviation, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

QuantizedTensor quantized(const Scheme& scheme, const Shape& shape, const std::vector<float>& values) {
  return encode(scheme, shape, {DType::f32, std::as_bytes(std::span(values))}, RangeRule::minmax);
}

struct Learning {
  QuantizedTensor weight;
  Rounding rounding;
  std::vector<int8_t> residual{};
  uint64_t steps = 0;

  Learning(const Scheme& scheme, const Shape& shape, const std::vector<float>& values, Rounding r)
      : weight(quantized(scheme, shape, values)), rounding(r) {
    if (rounding == Rounding::error_compensated) residual.resize(values.size());
  }
  void add(std::vector<float> change, float decay = 0) {
    ++steps;
    add_to_quantized({.rounding = rounding, .decay = decay, .first = {7, 2 * steps}, .second = {7, 2 * steps + 1}},
                     change, residual, weight);
  }
  /// As the weight says, and with what is kept of the errors.
  std::vector<float> values() const { return decode(weight); }
  std::vector<float> exact_values() const {
    std::vector<float> all = values();
    const Decoder decoder(weight);
    const GroupMap groups(weight.scheme.scale->grouping, weight.shape);
    for (size_t i = 0; i < residual.size(); ++i)
      all[i] += static_cast<float>(residual[i]) / kResidualSteps *
                decoder.scales()[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))];
    return all;
  }
};

constexpr Rounding kBoth[] = {Rounding::stochastic, Rounding::error_compensated};

class Requantizing : public testing::TestWithParam<Case> {};

TEST_P(Requantizing, AChangeOfNothingChangesNothing) {
  const Shape shape = {70, 300};
  for (const Rounding rounding : kBoth) {
    Learning learning(scheme_of(GetParam()), shape, normal(70 * 300, 0.02f, 1), rounding);
    const QuantizedTensor before = learning.weight;
    for (int i = 0; i < 3; ++i) learning.add(std::vector<float>(70 * 300));
    EXPECT_EQ(learning.weight, before);
  }
}

/// Changes of a hundredth of a step, which rounding to nearest would lose every time: the mean over all weights moves
/// as far as the changes add up to, whichever way it is rounded.
TEST_P(Requantizing, SmallChangesAreNotLost) {
  const Shape shape = {70, 300};
  const size_t count = 70 * 300;
  for (const Rounding rounding : kBoth)
    for (const float sign : {1.0f, -1.0f}) {
      Learning learning(scheme_of(GetParam()), shape, normal(count, 0.02f, 2), rounding);
      const std::vector<float> before = learning.values();
      const float change = sign * 0.02f / std::ldexp(1.0f, GetParam().bits) / 20;
      constexpr int kSteps = 100;
      for (int i = 0; i < kSteps; ++i) learning.add(std::vector<float>(count, change));
      const std::vector<float> after = learning.exact_values();
      double moved = 0;
      for (size_t i = 0; i < count; ++i) moved += static_cast<double>(after[i] - before[i]);
      moved /= static_cast<double>(count);
      const double expected = kSteps * static_cast<double>(change);
      // At most half a step of each weight is open, at random: of 21,000 weights 1 % of a step.
      EXPECT_NEAR(moved, expected, 0.04 * std::fabs(expected)) << sign;
    }
}

/// With the errors kept, each weight itself stays within a step (and a little) of the float that learns beside it.
TEST_P(Requantizing, KeptErrorsFollowTheFloats) {
  const Shape shape = {70, 300};
  const size_t count = 70 * 300;
  Learning learning(scheme_of(GetParam()), shape, normal(count, 0.02f, 3), Rounding::error_compensated);
  std::vector<float> floats = learning.values();
  for (uint32_t t = 0; t < 50; ++t) {
    const std::vector<float> change = normal(count, 2e-4f, 100 + t);
    for (size_t i = 0; i < count; ++i) floats[i] += change[i] - 1e-3f * floats[i];
    learning.add(change, 1e-3f);
  }
  const std::vector<float> values = learning.values(), exact = learning.exact_values();
  const Decoder decoder(learning.weight);
  const GroupMap groups(learning.weight.scheme.scale->grouping, shape);
  for (size_t i = 0; i < count; ++i) {
    const float step = decoder.scales()[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))];
    ASSERT_LE(std::fabs(values[i] - floats[i]), 0.6f * step) << i;
    ASSERT_LE(std::fabs(exact[i] - floats[i]), 0.1f * step) << i;
  }
}

TEST_P(Requantizing, ThreadsDoNotMatter) {
  const Shape shape = {70, 300};
  const size_t count = 70 * 300, threads = thread_count();
  for (const Rounding rounding : kBoth) {
    std::vector<Learning> learnings;
    for (const size_t n : {size_t{1}, size_t{3}}) {
      set_thread_count(n);
      learnings.emplace_back(scheme_of(GetParam()), shape, normal(count, 0.02f, 4), rounding);
      for (uint32_t t = 0; t < 5; ++t) learnings.back().add(normal(count, 2e-3f, t), 0.01f);
    }
    set_thread_count(threads);
    EXPECT_EQ(learnings[0].weight, learnings[1].weight);
    EXPECT_EQ(learnings[0].residual, learnings[1].residual);
  }
}

INSTANTIATE_TEST_SUITE_P(Schemes, Requantizing,
                         testing::Values(Case{"int8_tensor", 8, Grouping::tensor(), DType::f32},
                                         Case{"int8_channel", 8, Grouping::channel(), DType::f32},
                                         Case{"int8_group64", 8, Grouping::along(64), DType::f16},
                                         Case{"int4_group32", 4, Grouping::along(32), DType::bf16},
                                         Case{"uint4_group32", 4, Grouping::along(32), DType::f16, true},
                                         Case{"uint8_channel", 8, Grouping::channel(), DType::f32, true},
                                         Case{"uint4_flat64", 4, Grouping::flat(64), DType::f32, true}),
                         [](const auto& test) { return test.param.name; });

const Scheme kInt8 = {.element = &integer_element(8, true), .scale = parameter(Grouping::channel(), plain(DType::f32))};

/// The largest weight of a row has the last code. Changes of a hundredth of a step in its direction are not lost
/// either: the scale grows.
TEST(RequantizingScales, GrowWhereCodesWouldSaturate) {
  constexpr size_t kRows = 400, kColumns = 16;
  for (const Rounding rounding : kBoth) {
    std::vector<float> values = normal(kRows * kColumns, 0.3f, 5), change(values.size(), 0);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = i % kColumns == 0 ? 1.27f : std::clamp(values[i], -1.2f, 1.2f);
      change[i] = i % kColumns == 0 ? 1e-4f : 0;
    }
    Learning learning(kInt8, {kRows, kColumns}, values, rounding);
    const float step = decode(*learning.weight.scale).at(0);
    values = learning.values();
    for (int i = 0; i < 300; ++i) learning.add(change);
    const std::vector<float> after = learning.values();
    double largest = 0, others = 0;
    for (size_t i = 0; i < after.size(); ++i)
      (i % kColumns == 0 ? largest : others) += static_cast<double>(after[i] - values[i]);
    EXPECT_NEAR(largest / kRows, 300 * 1e-4, 0.003);
    EXPECT_NEAR(others / (kRows * (kColumns - 1)), 0, 0.0005);
    // Rounded at random, one row in e^3 has not moved yet.
    size_t grown = 0;
    for (const float scale : decode(*learning.weight.scale)) grown += scale > step;
    EXPECT_GT(grown, kRows * 9 / 10);
  }
}

TEST(RequantizingScales, ShrinkWhereHalfTheCodesAreUnused) {
  const std::vector<float> values = {1.27f, 0.3f, -0.2f, 0.05f, 1.27f, 0.3f, -0.2f, 0.05f};
  for (const Rounding rounding : kBoth) {
    Learning learning(kInt8, {2, 4}, values, rounding);
    const float step = decode(*learning.weight.scale).at(0);
    learning.add({-0.7f, 0, 0, 0, -0.5f, 0, 0, 0});  // 0.57 is less than half of 1.27; 0.77 is more
    const std::vector<float> scales = decode(*learning.weight.scale), after = learning.values();
    EXPECT_NEAR(scales[0], 0.57f * 17 / 16 / 127, 2e-4f);
    EXPECT_EQ(scales[1], step);
    for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(after[i], i == 0 ? 0.57f : values[i], 2 * step);
  }
}

/// All zeros have the scale 0, on whose grid nothing can move.
TEST(RequantizingScales, AreMadeForWhatWasAllZeros) {
  for (const Rounding rounding : kBoth) {
    Learning learning(kInt8, {2, 4}, std::vector<float>(8), rounding);
    learning.add({0.1f, -0.2f, 0.05f, 0, 0, 0, 0, 0});
    const std::vector<float> after = learning.values();
    for (size_t i = 0; i < 8; ++i)
      EXPECT_NEAR(after[i], (std::vector<float>{0.1f, -0.2f, 0.05f, 0, 0, 0, 0, 0})[i], 0.003f) << i;
    EXPECT_NE(after[0], 0);
  }
}

TEST(RequantizingScales, StayWhereTheirTypeHasNoneThatFits) {
  Scheme scheme = kInt8;
  scheme.scale = parameter(Grouping::channel(), plain(DType::f16));
  Learning learning(scheme, {1, 4}, {1e6f, 1, 2, 3}, Rounding::stochastic);
  learning.add({1e9f, 0, 0, 0});  // a scale of 8e6 is more than f16 has: the code stays the last one
  EXPECT_TRUE(std::isfinite(learning.values()[0]));
  EXPECT_EQ(learning.weight.codes[0], std::byte{127});
}

TEST(Requantizable, AreGridsOfIntegers) {
  const Shape shape = {4, 64};
  EXPECT_TRUE(can_requantize(kInt8, shape));
  EXPECT_FALSE(can_requantize(plain(DType::f32), shape));
  Scheme nf4 = kInt8;
  nf4.element = find_element("nf4");
  EXPECT_FALSE(can_requantize(nf4, shape));
  Scheme hqq = kInt8;
  hqq.offset_kind = OffsetKind::float_zero;
  hqq.offset = hqq.scale;
  EXPECT_FALSE(can_requantize(hqq, shape));
}

}  // namespace
}  // namespace bitwright
