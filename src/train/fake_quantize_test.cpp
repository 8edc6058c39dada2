#include "train/fake_quantize.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.hpp"
#include "tests/golden_cases.hpp"
#include "train/observer.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

IntegerGrid grid_of(const Grouping& grouping, int bits, bool is_signed) {
  const ElementType& type = integer_element(bits, is_signed);
  return {grouping, type.lowest, type.highest};
}

/// Every scheme that training goes through, with weights of 6 rows of 40: groups of 16 are ragged.
struct Named {
  std::string name;
  Scheme scheme;
};
std::vector<Named> schemes() {
  std::vector<Named> all;
  const auto integer = [](int bits, bool symmetric, const Grouping& grouping, DType scales) {
    Scheme s = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(scales))};
    if (!symmetric) {
      s.offset_kind = OffsetKind::zero_point;
      s.offset = parameter(grouping, {.element = s.element});
    }
    return s;
  };
  for (const int bits : {8, 4, 3, 2})
    for (const bool symmetric : {true, false})
      for (const Grouping& grouping :
           {Grouping::tensor(), Grouping::channel(), Grouping::along(16), Grouping::flat(64)}) {
        const Scheme s = integer(bits, symmetric, grouping, bits == 4 ? DType::f16 : DType::f32);
        all.push_back({describe(s), s});
      }
  const auto other = [&](const ElementType* element, const Grouping& grouping, const Scheme& scales) {
    const Scheme s = {.element = element, .scale = parameter(grouping, scales)};
    all.push_back({describe(s), s});
  };
  const Scheme nested = {.element = find_element("dynamic8"),
                         .scale = parameter(Grouping::flat(256), plain(DType::f32)),
                         .offset_kind = OffsetKind::bias,
                         .offset = parameter(Grouping::tensor(), plain(DType::f32))};
  other(find_element("nf4"), Grouping::flat(64), plain(DType::f32));
  other(find_element("nf4"), Grouping::flat(64), nested);
  other(find_element("fp4"), Grouping::flat(64), plain(DType::f32));
  other(&float_element(DType::f8_e4m3), Grouping::channel(), plain(DType::f32));
  other(&float_element(DType::f8_e5m2), Grouping::tensor(), plain(DType::f32));
  other(&float_element(DType::f8_e4m3), {.kind = Grouping::Kind::block, .block_rows = 4, .block_columns = 16},
        plain(DType::f32));
  return all;
}

Tensor weights() {
  torch::manual_seed(7);
  return torch::randn({6, 40}) * 0.05;
}

Tensor decoded(const QuantizedTensor& t) { return torch::tensor(decode(t)).reshape(t.shape); }

TEST(FakeQuantize, IsDecodeOfEncodeAndGradientsGoStraightThrough) {
  for (const Named& c : schemes()) {
    SCOPED_TRACE(c.name);
    const Tensor w = weights().requires_grad_();
    const std::span values(w.data_ptr<float>(), static_cast<size_t>(w.numel()));
    const Tensor y = fake_quantize(w, quantizer(c.scheme));
    EXPECT_TRUE(torch::equal(y, decoded(encode(c.scheme, w.sizes().vec(), values))));
    EXPECT_FALSE(torch::equal(y, w));
    const Tensor slope = torch::randn_like(w);
    (y * slope).sum().backward();
    EXPECT_TRUE(torch::equal(w.grad(), slope));
  }
}

TEST(FakeQuantize, WhatASearchedRangeLeavesOutHasNoGradient) {
  for (const Named& c : schemes()) {
    SCOPED_TRACE(c.name);
    const Tensor w = weights();
    w[0][3] = 0.4;  // far beyond the others: the search gives it up
    w.requires_grad_();
    const std::span values(w.data_ptr<float>(), static_cast<size_t>(w.numel()));
    const auto encoded = encode(c.scheme, w.sizes().vec(), values, [](const Scheme& s, std::span<const float> group) {
      return choose_range(RangeRule::mse, s, group);
    });
    const Tensor y = fake_quantize(w, quantizer(c.scheme, RangeRule::mse), /*clips=*/true);
    EXPECT_TRUE(torch::equal(y, decoded(encoded)));
    y.sum().backward();
    const Tensor left_out = w.grad() == 0;
    EXPECT_TRUE((y.abs() < w.abs()).masked_select(left_out).all().item<bool>());
    EXPECT_TRUE(y[0][3].item<float>() > 0.3f || left_out[0][3].item<bool>());
    EXPECT_GT(w.grad().sum().item<float>(), 150);
  }
}

/// PyTorch's own operations are the definition.
TEST(SpecificationC, C7_GivenScalesAreThoseOfPyTorch) {
  torch::manual_seed(1);
  for (const int bits : {8, 4, 3, 2})
    for (const bool is_signed : {true, false}) {
      SCOPED_TRACE(fmt::format("{} bits, signed {}", bits, is_signed));
      const IntegerGrid grid = grid_of(Grouping::channel(), bits, is_signed);
      const auto low = static_cast<int64_t>(grid.lowest), high = static_cast<int64_t>(grid.highest);
      const Tensor scale = (torch::rand({6}) * 0.05 + 0.01), slope = torch::randn({6, 40});
      const Tensor zero = torch::randint(low, high + 1, {6}, torch::kFloat);
      const Tensor base = torch::randn({6, 40}) * scale.unsqueeze(1) * static_cast<float>(high - low) / 3;
      const double factor = 0.37;
      Tensor x = base.clone().requires_grad_(), s = scale.clone().requires_grad_(), z = zero.clone().requires_grad_();
      (fake_quantize(x, s, z, grid, factor) * slope).sum().backward();
      Tensor px = base.clone().requires_grad_(), ps = scale.clone().requires_grad_(),
             pz = zero.clone().requires_grad_();
      const Tensor expected = at::_fake_quantize_learnable_per_channel_affine(px, ps, pz, 0, low, high, factor);
      (expected * slope).sum().backward();
      EXPECT_TRUE(torch::equal(fake_quantize(x, s, z, grid), expected));
      EXPECT_TRUE(torch::equal(fake_quantize(x, s, z, grid), torch::fake_quantize_per_channel_affine(
                                                                 base, scale, zero.to(torch::kInt), 0, low, high)));
      EXPECT_TRUE(torch::equal(x.grad(), px.grad()));
      EXPECT_TRUE(torch::allclose(s.grad(), ps.grad(), 1e-4, 1e-4)) << s.grad() << ps.grad();
      EXPECT_TRUE(torch::allclose(z.grad(), pz.grad(), 1e-4, 1e-5)) << z.grad() << pz.grad();
      EXPECT_GT((x.grad() == 0).sum().item<int64_t>(), 0);  // some are clipped, or the test says nothing
    }
}

TEST(SpecificationC, C7_FakeQuantizationAsPyTorchWroteItDown) {
  int cases = 0;
  for (const test::GoldenCase& c : test::golden_cases("torch_native", "grad")) {
    SCOPED_TRACE(c.name);
    const auto read = [&](const char* name) { return torch::tensor(c.floats(name)).reshape({32, 256}); };
    const bool per_channel = c.find("scales") != nullptr;
    const Tensor scale = torch::tensor(per_channel ? c.floats("scales") : std::vector<float>{c.params["scale"]});
    const IntegerGrid grid = {.grouping = per_channel ? Grouping::channel() : Grouping::tensor(),
                              .lowest = c.params["quant_min"],
                              .highest = c.params["quant_max"]};
    const Tensor x = read("input").requires_grad_(), y = fake_quantize(x, scale, {}, grid);
    y.sum().backward();
    EXPECT_TRUE(torch::equal(y, read("output")));
    EXPECT_TRUE(torch::equal(x.grad(), read("grad")));
    ++cases;
  }
  if (cases == 0) GTEST_SKIP() << "no golden cases here";
}

TEST(Observer, MovingAverageAsPyTorchWroteItDown) {
  for (const test::GoldenCase& c : test::golden_cases("torch_native", "inputs")) {
    const Tensor inputs = torch::tensor(c.floats("inputs")).reshape({5, 8, 32});
    Observer observer({.averaging = 0.01});
    for (int64_t i = 0; i < inputs.size(0); ++i) observer.update(inputs[i]);
    EXPECT_NEAR(observer.range().low, c.floats("min_val").at(0), 1e-6);
    EXPECT_NEAR(observer.range().high, c.floats("max_val").at(0), 1e-6);
  }
}

/// Central differences of the function whose gradient is given: rounding held, so that it is smooth. Of LSQ's scale
/// that is s * round(v / s) with the rounding error's derivative taken as v / s's (Esser et al., eq. 1-3).
TEST(FakeQuantize, GradientsAgainstCentralDifferences) {
  for (const Grouping& grouping : {Grouping::tensor(), Grouping::channel(), Grouping::along(16), Grouping::flat(64)})
    for (const bool symmetric : {true, false}) {
      const IntegerGrid grid = grid_of(grouping, 3, symmetric);
      const Tensor base = weights(), slope = torch::randn({6, 40});
      const Shape groups = parameter_shape(grouping, {6, 40});
      const Tensor scale = torch::rand(groups) * 0.01 + 0.015;
      const Tensor zero = symmetric ? Tensor() : torch::full(groups, 3.0f);
      Tensor x = base.clone().requires_grad_(), s = scale.clone().requires_grad_();
      Tensor z = zero.defined() ? zero.clone().requires_grad_() : Tensor();
      (fake_quantize(x, s, z, grid) * slope).sum().backward();

      const GroupMap map(grouping, {6, 40});
      const float* const v = base.data_ptr<float>();
      const float* const g = slope.data_ptr<float>();
      std::vector<double> expected_s(static_cast<size_t>(scale.numel())), expected_z(expected_s.size());
      for (int64_t i = 0; i < base.numel(); ++i) {
        const auto at = static_cast<size_t>(map.group_of(i));
        const double s0 = static_cast<double>(scale.flatten()[static_cast<int64_t>(at)].item<float>());
        const double z0 = zero.defined() ? 3 : 0, v0 = static_cast<double>(v[i]), h = 1e-6;
        const double rounded = std::nearbyint(static_cast<float>(v0) * (1.0f / static_cast<float>(s0)));
        const auto lowest = static_cast<double>(grid.lowest), highest = static_cast<double>(grid.highest);
        const bool inside = rounded + z0 >= lowest && rounded + z0 <= highest;
        // Within the range round(v / s) moves as v / s does; what is clipped stays the last code.
        const auto surrogate = [&](double value, double step, double zero_point) {
          const double code =
              inside ? value / step + (rounded - v0 / s0) + zero_point : std::clamp(rounded + z0, lowest, highest);
          return (code - zero_point) * step;
        };
        const double slope_here = static_cast<double>(g[i]);
        const double dv = (surrogate(v0 + h, s0, z0) - surrogate(v0 - h, s0, z0)) / (2 * h);
        ASSERT_NEAR(x.grad().flatten()[i].item<float>(), dv * slope_here, 1e-3);
        expected_s[at] += slope_here * (surrogate(v0, s0 + h, z0) - surrogate(v0, s0 - h, z0)) / (2 * h);
        expected_z[at] += slope_here * (surrogate(v0, s0, z0 + h) - surrogate(v0, s0, z0 - h)) / (2 * h);
      }
      for (size_t i = 0; i < expected_s.size(); ++i) {
        EXPECT_NEAR(s.grad().flatten()[static_cast<int64_t>(i)].item<float>(), expected_s[i], 1e-2);
        if (!z.defined()) continue;
        EXPECT_NEAR(z.grad().flatten()[static_cast<int64_t>(i)].item<float>(), expected_z[i], 1e-3);
      }
    }
}

TEST(FakeQuantize, FactorAndFirstScalesOfThePaper) {
  const IntegerGrid grid = grid_of(Grouping::along(16), 4, true);
  EXPECT_DOUBLE_EQ(lsq_factor(grid, {6, 40}), 1 / std::sqrt(16.0 * 7));
  EXPECT_DOUBLE_EQ(lsq_factor(grid_of(Grouping::tensor(), 2, true), {6, 40}), 1 / std::sqrt(240.0 * 1));
  const Tensor w = weights(), scales = lsq_scales(w, grid);
  ASSERT_EQ(scales.numel(), 18);
  EXPECT_NEAR(scales[2].item<float>(), 2 * w[0].slice(0, 32, 40).abs().mean().item<float>() / std::sqrt(7.0f), 1e-6);
}

TEST(FakeQuantize, GivenScalesBecomeCodesThatMeanTheSame) {
  for (const Named& c : schemes()) {
    const auto grid = integer_grid(c.scheme);
    if (!grid) continue;
    SCOPED_TRACE(c.name);
    const Tensor w = weights();
    const Shape groups = parameter_shape(grid->grouping, w.sizes().vec());
    const DType type = *dtype_of(*c.scheme.scale->scheme->element);
    const Tensor scale = stored_scale(torch::rand(groups) * 0.01 + 0.01, type);
    const bool has_zero = c.scheme.offset.has_value();
    const Tensor zero = has_zero ? stored_zero(torch::rand(groups) * grid->highest, *grid) : Tensor();
    const QuantizedTensor t = quantize_with(c.scheme, w, scale, zero);
    check_sizes(t, "test");
    EXPECT_TRUE(torch::equal(decoded(t), fake_quantize(w, scale, zero, *grid)));
  }
}

TEST(FakeQuantize, SixteenBitValuesAndResults) {
  const IntegerGrid grid = grid_of(Grouping::channel(), 4, true);
  const Tensor w = weights(), scale = torch::full({6}, 0.02f);
  const Tensor expected = fake_quantize(w.to(torch::kBFloat16).to(torch::kFloat), scale, {}, grid);
  for (const auto type : {torch::kBFloat16, torch::kHalf}) {
    Tensor x = w.to(type).requires_grad_();
    const Tensor y = fake_quantize(x, scale, {}, grid);
    EXPECT_EQ(y.scalar_type(), type);
    EXPECT_TRUE(torch::equal(y, fake_quantize(x.detach().to(torch::kFloat), scale, {}, grid).to(type)));
    y.sum().backward();
    EXPECT_EQ(x.grad().scalar_type(), type);
    EXPECT_TRUE(torch::equal(fake_quantize(w, scale, {}, grid, 1, type), fake_quantize(w, scale, {}, grid).to(type)));
  }
  const Tensor wide = w.to(torch::kDouble);
  EXPECT_TRUE(torch::equal(fake_quantize(wide, scale, {}, grid), fake_quantize(w, scale, {}, grid).to(torch::kDouble)));
}

TEST(FakeQuantize, StoredNumbersPassGradients) {
  Tensor s = torch::tensor({0.0123456f, -1.0f}).requires_grad_();
  const Tensor stored = stored_scale(s, DType::f16);
  EXPECT_EQ(stored[0].item<float>(), round_to(DType::f16, 0.0123456f));
  EXPECT_GT(stored[1].item<float>(), 0);
  stored.sum().backward();
  EXPECT_TRUE(torch::equal(s.grad(), torch::ones({2})));
}

TEST(FakeQuantize, ActivationsDynamicAndFixed) {
  torch::manual_seed(3);
  const Tensor x = torch::randn({2, 5, 16});
  const Scheme per_token = {.element = &integer_element(8, true),
                            .scale = parameter(Grouping::channel(), plain(DType::f32))};
  const Tensor dynamic = fake_quantize_activation(x, {.scheme = per_token});
  EXPECT_LT((dynamic - x).abs().max().item<float>(), 4.0f / 127);
  const Tensor steps = dynamic / (x.abs().amax(-1, true) / 127);
  EXPECT_LT((steps - steps.round()).abs().max().item<float>(), 1e-3);
  for (const ElementType* element : {&integer_element(8, true), &float_element(DType::f8_e4m3)}) {
    const Scheme scheme = {.element = element, .scale = parameter(Grouping::tensor(), plain(DType::f32))};
    Tensor input = x.clone().requires_grad_();
    const Tensor y = fake_quantize_activation(input, fixed_activation(scheme, {-1, 1}));
    EXPECT_LE(y.abs().max().item<float>(), 129.0f / 127);
    y.sum().backward();
    EXPECT_EQ(input.grad().masked_select(x.abs() > 1.02f).abs().max().item<float>(), 0);
    EXPECT_EQ(input.grad().masked_select(x.abs() < 0.99f).min().item<float>(), 1);
  }
}

// ---- observers ----

TEST(Observer, MinMaxMovingAverageAndPercentile) {
  Observer extremes({.estimate = RangeEstimate::minmax}), average({.averaging = 0.5});
  EXPECT_THROW(extremes.range(), Error);
  for (const auto& batch : {torch::tensor({-1.0f, 3.0f}), torch::tensor({-2.0f, 1.0f})}) {
    extremes.update(batch);
    average.update(batch);
  }
  EXPECT_EQ(extremes.range().low, -2);
  EXPECT_EQ(extremes.range().high, 3);
  EXPECT_EQ(average.range().low, -1.5f);
  EXPECT_EQ(average.range().high, 2);
  extremes.freeze();
  extremes.update(torch::tensor({100.0f}));
  EXPECT_EQ(extremes.range().high, 3);

  Observer percentile({.estimate = RangeEstimate::percentile, .percentile = 98});
  const Tensor values = torch::arange(1000).to(torch::kFloat) / 100;  // 0 … 9.99
  percentile.update(values.slice(0, 0, 300));
  percentile.update(values.slice(0, 300, 1000));
  EXPECT_NEAR(percentile.range().low, 0.1, 0.01);
  EXPECT_NEAR(percentile.range().high, 9.9, 0.01);
  Observer reversed({.estimate = RangeEstimate::percentile, .percentile = 98});
  reversed.update(values.slice(0, 300, 1000));
  reversed.update(values.slice(0, 0, 300));
  EXPECT_TRUE(torch::equal(percentile.state(), reversed.state()));
}

TEST(Observer, StateIsAllThereIs) {
  for (const auto estimate : {RangeEstimate::minmax, RangeEstimate::moving_average, RangeEstimate::percentile}) {
    Observer one({.estimate = estimate}), other({.estimate = estimate});
    torch::manual_seed(2);
    one.update(torch::randn({100}));
    other.state().copy_(one.state());
    const Tensor more = torch::randn({50}) * 3;
    one.update(more);
    other.update(more);
    EXPECT_EQ(one.range().low, other.range().low);
    EXPECT_EQ(one.range().high, other.range().high);
  }
}

TEST(Observer, RefusesWhatIsWrong) {
  EXPECT_THROW(Observer({.averaging = 0}), Error);
  EXPECT_THROW(Observer({.percentile = 50}), Error);
  Observer observer({});
  EXPECT_THROW(observer.update(torch::tensor({1.0f, INFINITY})), Error);
  EXPECT_THROW(observer.update(torch::tensor({1.0f, NAN})), Error);
  EXPECT_FALSE(observer.has_data());
}

}  // namespace
}  // namespace bitwright::train
