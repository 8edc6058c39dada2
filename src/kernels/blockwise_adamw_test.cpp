#include "kernels/blockwise_adamw.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/philox.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {
namespace {

/// The map as bitsandbytes 0.50 makes it (functional.py, create_dynamic_map), in double.
std::vector<double> dynamic_map(bool is_signed) {
  std::vector<double> values = {0, 1};
  for (int i = 0; i < 7; ++i) {
    const int count = is_signed ? 1 << i : 2 << i;
    for (int k = 0; k < count; ++k) {
      const double value = std::pow(10.0, i - 6) * (0.1 + 0.9 * (2 * k + 1) / (2 * count));
      values.push_back(value);
      if (is_signed) values.push_back(-value);
    }
  }
  std::ranges::sort(values);
  return values;
}

std::vector<float> normal(size_t count, float deviation, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

TEST(DynamicCode, HasTheValuesOfBitsandbytes) {
  std::vector<uint8_t> codes(256);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i);
  std::vector<float> values(256);
  for (const bool is_signed : {true, false}) {
    (is_signed ? decode_signed : decode_unsigned)(codes.data(), 1, values);
    const std::vector<double> expected = dynamic_map(is_signed);
    ASSERT_EQ(expected.size(), 256u);
    for (size_t i = 0; i < 256; ++i)
      EXPECT_NEAR(static_cast<double>(values[i]), expected[i], 3e-7 * std::fabs(expected[i])) << i;
  }
}

TEST(DynamicCode, RoundsToTheNearestValue) {
  for (const bool is_signed : {true, false}) {
    const std::vector<double> map = dynamic_map(is_signed);
    std::mt19937 random(7);
    std::uniform_real_distribution<float> exponent(-8, 0);
    for (int round = 0; round < 40; ++round) {
      std::vector<float> values(kMomentBlock - static_cast<size_t>(round));
      for (float& value : values) {
        value = std::pow(10.0f, exponent(random));
        if (is_signed && random() % 2 == 0) value = -value;
      }
      std::vector<uint8_t> codes(values.size());
      const float scale = (is_signed ? encode_signed : encode_unsigned)(values, codes.data());
      float largest = 0;
      for (const float value : values) largest = std::max(largest, std::fabs(value));
      ASSERT_EQ(scale, largest);
      for (size_t i = 0; i < values.size(); ++i) {
        const double value = static_cast<double>(values[i]) / static_cast<double>(scale);
        double least = 2;
        for (const double entry : map)
          if (is_signed || entry > 0) least = std::min(least, std::fabs(entry - value));
        EXPECT_NEAR(std::fabs(map[codes[i]] - value), least, 2e-7) << value;
      }
    }
  }
}

TEST(DynamicCode, EveryValueIsItsOwnCode) {
  std::vector<uint8_t> codes(256), again(256);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i);
  std::vector<float> values(256);
  for (const bool is_signed : {true, false}) {
    (is_signed ? decode_signed : decode_unsigned)(codes.data(), 0.125f, values);
    EXPECT_EQ((is_signed ? encode_signed : encode_unsigned)(values, again.data()), 0.125f);
    EXPECT_EQ(again, codes);
  }
}

TEST(DynamicCode, WhatHasNoReciprocalIsZero) {
  for (const float value : {0.0f, std::numeric_limits<float>::denorm_min()}) {
    const std::vector<float> values(9, value);
    std::vector<uint8_t> codes(9);
    std::vector<float> decoded(9, 1);
    decode_signed(codes.data(), encode_signed(values, codes.data()), decoded);
    EXPECT_EQ(decoded, std::vector<float>(9, 0));
    decode_unsigned(codes.data(), encode_unsigned(values, codes.data()), decoded);
    EXPECT_EQ(decoded, std::vector<float>(9, 0));
  }
}

/// A small second moment beside large ones stays above 0, or the next update would be divided by nearly nothing.
TEST(DynamicCode, SecondMomentsDoNotVanish) {
  std::vector<float> values(kMomentBlock, 1), decoded(kMomentBlock);
  values[3] = 1e-20f;
  values[4] = 0;
  std::vector<uint8_t> codes(kMomentBlock);
  decode_unsigned(codes.data(), encode_unsigned(values, codes.data()), decoded);
  EXPECT_GT(decoded[3], 0);
  EXPECT_EQ(decoded[4], 0);
}

struct Adam {
  std::vector<double> weight, m, v;
  /// The paper's algorithm 2.
  void step(const std::vector<float>& gradient, double lr, double decay, int t) {
    for (size_t i = 0; i < weight.size(); ++i) {
      const auto g = static_cast<double>(gradient[i]);
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.95 * v[i] + 0.05 * g * g;
      weight[i] -=
          lr * (m[i] / (1 - std::pow(0.9, t)) / (std::sqrt(v[i] / (1 - std::pow(0.95, t))) + 1e-8) + decay * weight[i]);
    }
  }
};

TEST(AdamW, FloatsFollowThePaper) {
  const size_t count = 1000;
  std::vector<float> weight = normal(count, 1, 1), m(count), v(count);
  Adam paper = {
      .weight = {weight.begin(), weight.end()}, .m = std::vector<double>(count), .v = std::vector<double>(count)};
  for (int t = 1; t <= 20; ++t) {
    std::vector<float> change = normal(count, 0.01f, static_cast<uint32_t>(t));
    paper.step(change, 0.01, 0.1, t);
    const auto step = AdamWStep::make(0.01, 0.9, 0.95, 1e-8, 0.1, t);
    adamw_changes(step, Moments32{m.data(), v.data()}, change);
    apply_changes(step, change, weight.data());
  }
  for (size_t i = 0; i < count; ++i) EXPECT_NEAR(static_cast<double>(weight[i]), paper.weight[i], 2e-6);
}

/// With moments in 8 bits the way of each weight stays near: within a tenth of its length on average.
TEST(AdamW, EightBitsFollowFloats) {
  const size_t count = 1000, blocks = moment_blocks(count);
  std::vector<uint8_t> first(count), second(count);
  std::vector<float> first_scale(blocks), second_scale(blocks), m(count), v(count);
  std::vector<float> weight8(count), weight32(count);
  const std::vector<float> mean = normal(count, 0.01f, 99);
  double difference = 0, length = 0;
  for (int t = 1; t <= 50; ++t) {
    std::vector<float> gradient = normal(count, 0.01f, static_cast<uint32_t>(t));
    for (size_t i = 0; i < count; ++i) gradient[i] += mean[i];
    const auto step = AdamWStep::make(0.01, 0.9, 0.95, 1e-8, 0, t);
    std::vector<float> change = gradient;
    adamw_changes(step, Moments8{first.data(), second.data(), first_scale.data(), second_scale.data()}, change);
    apply_changes(step, change, weight8.data());
    change = gradient;
    adamw_changes(step, Moments32{m.data(), v.data()}, change);
    apply_changes(step, change, weight32.data());
  }
  for (size_t i = 0; i < count; ++i) {
    difference += std::fabs(static_cast<double>(weight8[i] - weight32[i]));
    length += std::fabs(static_cast<double>(weight32[i]));
  }
  EXPECT_LT(difference, 0.1 * length);
  EXPECT_GT(difference, 0);
}

/// Test vectors of the paper's own library (Random123, kat_vectors).
TEST(Philox, GivesTheKnownAnswers) {
  const auto same = [](const PhiloxWords& a, const PhiloxWords& b) { return std::ranges::equal(a.words, b.words); };
  EXPECT_TRUE(same(philox({{0, 0, 0, 0}}, 0), {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
  EXPECT_TRUE(same(philox({{~0u, ~0u, ~0u, ~0u}}, ~uint64_t{0}), {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
  EXPECT_TRUE(same(philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822),
                   {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}

TEST(Philox, NumbersDoNotDependOnWhereOneBegins) {
  const RandomStream stream = {.seed = 12345678901234, .stream = 98765432109876};
  std::vector<uint32_t> all(1000), some(700);
  random_numbers(stream, 0, all);
  random_numbers(stream, 300, some);
  EXPECT_TRUE(std::ranges::equal(some, std::span(all).subspan(300)));
  for (const size_t i : {size_t{0}, size_t{63}, size_t{64}, size_t{255}, size_t{256}, size_t{999}}) {
    const auto counter = static_cast<uint32_t>(i / 256 * 64 + i % 64);
    const PhiloxWords words = philox(
        {{counter, 0, static_cast<uint32_t>(stream.stream), static_cast<uint32_t>(stream.stream >> 32)}}, stream.seed);
    EXPECT_EQ(all[i], words.words[i % 256 / 64]) << i;
  }
}

}  // namespace
}  // namespace bitwright
