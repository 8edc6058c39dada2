#include "kernels/activation.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/affine.hpp"

namespace bitwright {
namespace {

Scheme scheme(const ElementType& element, const Grouping& grouping) {
  return {.element = &element, .scale = parameter(grouping, plain(DType::f32))};
}
Scheme asymmetric(const Grouping& grouping) {
  Scheme s = scheme(integer_element(8, false), grouping);
  s.offset_kind = OffsetKind::zero_point;
  s.offset = parameter(grouping, {.element = &integer_element(8, false)});
  return s;
}
const ElementType& int8() { return integer_element(8, true); }
const ElementType& e4m3() { return float_element(DType::f8_e4m3); }

std::shared_ptr<const QuantizedTensor> number(const Scheme& of, float value) {
  return std::make_shared<const QuantizedTensor>(encode(of, {1}, std::span(&value, 1)));
}

/// Rows of very different sizes, one of zeros.
std::vector<float> inputs(size_t tokens, size_t columns) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(tokens * columns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = normal(random) * std::ldexp(1.0F, static_cast<int>(i / columns) % 9 - 4);
  if (tokens > 2) std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(columns), columns, 0.0F);
  return x;
}

TEST(Activations, DynamicIsTheDefinition) {
  for (const Scheme& s :
       {scheme(int8(), Grouping::channel()), scheme(int8(), Grouping::tensor()), scheme(int8(), Grouping::along(16)),
        asymmetric(Grouping::channel()), asymmetric(Grouping::tensor()), scheme(e4m3(), Grouping::channel()),
        scheme(e4m3(), Grouping::tensor())}) {
    for (const auto& [tokens, columns] : {std::pair<size_t, size_t>{1, 1}, {3, 48}, {37, 80}}) {
      SCOPED_TRACE(describe(s));
      const std::vector<float> x = inputs(tokens, columns);
      const Shape shape = {static_cast<int64_t>(tokens), static_cast<int64_t>(columns)};
      std::vector<float> out(x.size());
      ActivationQuantizer({.scheme = s}).apply(x.data(), tokens, columns, out.data());
      EXPECT_EQ(out, decode(encode(s, shape, x)));
      std::vector<float> in_place = x;
      ActivationQuantizer({.scheme = s}).apply(in_place.data(), tokens, columns, in_place.data());
      EXPECT_EQ(in_place, out);
    }
  }
}

TEST(Activations, StoredScalesAreUsedAsTheyAre) {
  const std::vector<float> x = inputs(21, 40);
  std::vector<float> out(x.size());
  const auto check = [&](const ActivationScheme& activation, float step, int64_t zero, const AffineRange& range) {
    ActivationQuantizer(activation).apply(x.data(), 21, 40, out.data());
    for (size_t i = 0; i < x.size(); ++i)
      ASSERT_EQ(out[i], static_cast<float>(quantize_affine(x[i], {step, zero}, range) - zero) * step) << x[i];
  };
  const Scheme s = scheme(int8(), Grouping::tensor());
  check({.scheme = s, .dynamic = false, .scale = number(plain(DType::f32), 0.123F)}, 0.123F, 0, {-128, 127});
  const Scheme a = asymmetric(Grouping::tensor());
  check({.scheme = a,
         .dynamic = false,
         .scale = number(plain(DType::f32), 0.25F),
         .offset = number({.element = &integer_element(8, false)}, 100)},
        0.25F, 100, {0, 255});
  const Scheme f = scheme(e4m3(), Grouping::tensor());
  ActivationQuantizer({.scheme = f, .dynamic = false, .scale = number(plain(DType::f32), 0x1p-8F)})
      .apply(x.data(), 21, 40, out.data());
  for (size_t i = 0; i < x.size(); ++i)
    ASSERT_EQ(out[i], e4m3_to_f32(f32_to_e4m3(std::clamp(x[i] * 256, -448.0F, 448.0F))) / 256) << x[i];
}

TEST(Activations, ATokenDoesNotDependOnTheOthersNorOnThreads) {
  const std::vector<float> x = inputs(50, 64);
  const ActivationQuantizer quantizer({.scheme = scheme(int8(), Grouping::channel())});
  std::vector<float> all(x.size()), one(64), alone(x.size());
  quantizer.apply(x.data(), 50, 64, all.data());
  for (size_t t = 0; t < 50; ++t) {
    quantizer.apply(x.data() + t * 64, 1, 64, one.data());
    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + static_cast<std::ptrdiff_t>(t * 64)));
  }
  const size_t threads = thread_count();
  set_thread_count(1);
  quantizer.apply(x.data(), 50, 64, alone.data());
  set_thread_count(threads);
  EXPECT_EQ(alone, all);
}

TEST(Activations, WhatIsNotKnownIsSaid) {
  const Scheme s = scheme(int8(), Grouping::tensor());
  EXPECT_TRUE(ActivationQuantizer::supports({.scheme = s}));
  EXPECT_FALSE(ActivationQuantizer::supports({.scheme = s, .dynamic = false}));  // no scale
  EXPECT_FALSE(ActivationQuantizer::supports(
      {.scheme = scheme(int8(), Grouping::channel()), .dynamic = false, .scale = number(plain(DType::f32), 1)}));
  Scheme nested = s;
  nested.scale = parameter(Grouping::along(16), scheme(e4m3(), Grouping::tensor()));
  EXPECT_FALSE(ActivationQuantizer::supports({.scheme = nested}));  // NVFP4's
  std::vector<float> x = {1, std::nanf(""), 2};
  EXPECT_THROW(ActivationQuantizer({.scheme = s}).apply(x.data(), 1, 3, x.data()), Error);
  EXPECT_THROW(ActivationQuantizer({.scheme = s, .dynamic = false, .scale = number(plain(DType::f32), 1)})
                   .apply(x.data(), 1, 3, x.data()),
               Error);
}

}  // namespace
}  // namespace bitwright
