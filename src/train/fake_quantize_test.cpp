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

/// Integers with given scales: every width, grouping and kind of range.
struct Given {
  std::string name;
  IntegerGrid grid;
  Tensor scale, zero;  ///< zero: undefined where it is symmetric
};
std::vector<Given> given_scales() {
  std::vector<Given> all;
  for (const int bits : {8, 4, 3, 2})
    for (const Grouping& grouping : {Grouping::tensor(), Grouping::channel(), Grouping::along(16), Grouping::flat(64)})
      for (const bool symmetric : {true, false}) {
        const IntegerGrid grid = grid_of(grouping, bits, symmetric);
        const Shape groups = parameter_shape(grouping, {6, 40});
        torch::manual_seed(static_cast<uint64_t>(bits));
        // The codes reach to about 0.08, 1.6 times the weights' deviation: some are clipped.
        const Tensor scale = (torch::rand(groups) + 1.5f) * 0.08f / std::exp2f(static_cast<float>(bits));
        const Tensor zero = symmetric ? Tensor() : torch::full(groups, std::floor(grid.highest / 2));
        all.push_back(
            {fmt::format("{} bits, {} groups, symmetric {}", bits, scale.numel(), symmetric), grid, scale, zero});
      }
  return all;
}

/// Central differences of the function whose gradient is given: rounding held, so that it is smooth. Of LSQ's scale
/// that is s * round(v / s) with the rounding error's derivative taken as v / s's (Esser et al., eq. 1-3).
TEST(FakeQuantize, GradientsAgainstCentralDifferences) {
  for (const Given& c : given_scales()) {
    SCOPED_TRACE(c.name);
    const IntegerGrid& grid = c.grid;
    const Tensor base = weights(), slope = torch::randn({6, 40});
    Tensor x = base.clone().requires_grad_(), s = c.scale.clone().requires_grad_();
    Tensor z = c.zero.defined() ? c.zero.clone().requires_grad_() : Tensor();
    (fake_quantize(x, s, z, grid) * slope).sum().backward();

    const GroupMap map(grid.grouping, {6, 40});
    const float* const v = base.data_ptr<float>();
    const float* const g = slope.data_ptr<float>();
    std::vector<double> expected_s(static_cast<size_t>(s.numel())), expected_z(expected_s.size()), size_s(expected_s);
    int clipped = 0;
    for (int64_t i = 0; i < base.numel(); ++i) {
      const auto at = static_cast<size_t>(map.group_of(i));
      const double s0 = static_cast<double>(c.scale.flatten()[static_cast<int64_t>(at)].item<float>());
      const double z0 = c.zero.defined() ? std::floor(static_cast<double>(grid.highest) / 2) : 0;
      const double v0 = static_cast<double>(v[i]), h = 1e-6;
      const double rounded = std::nearbyint(static_cast<float>(v0) * (1.0f / static_cast<float>(s0)));
      const auto lowest = static_cast<double>(grid.lowest), highest = static_cast<double>(grid.highest);
      const bool inside = rounded + z0 >= lowest && rounded + z0 <= highest;
      clipped += inside ? 0 : 1;
      // Within the range round(v / s) moves as v / s does; what is clipped stays the last code.
      const auto surrogate = [&](double value, double step, double zero_point) {
        const double code =
            inside ? value / step + (rounded - v0 / s0) + zero_point : std::clamp(rounded + z0, lowest, highest);
        return (code - zero_point) * step;
      };
      const double slope_here = static_cast<double>(g[i]);
      const double dv = (surrogate(v0 + h, s0, z0) - surrogate(v0 - h, s0, z0)) / (2 * h);
      ASSERT_NEAR(x.grad().flatten()[i].item<float>(), dv * slope_here, 1e-3);
      const double ds = slope_here * (surrogate(v0, s0 + h, z0) - surrogate(v0, s0 - h, z0)) / (2 * h);
      expected_s[at] += ds;
      size_s[at] += std::fabs(slope_here) * (std::fabs(rounded) + std::fabs(v0 / s0));
      expected_z[at] += slope_here * (surrogate(v0, s0, z0 + h) - surrogate(v0, s0, z0 - h)) / (2 * h);
    }
    EXPECT_GT(clipped, 0);
    for (size_t i = 0; i < expected_s.size(); ++i) {
      EXPECT_NEAR(s.grad().flatten()[static_cast<int64_t>(i)].item<float>(), expected_s[i], 1e-4 * size_s[i]);
      if (!z.defined()) continue;
      EXPECT_NEAR(z.grad().flatten()[static_cast<int64_t>(i)].item<float>(), expected_z[i], 1e-3);
    }
  }
}

/// Central differences of the function itself, one code to either side: straight through is their slope.
TEST(FakeQuantize, ACodeFurtherIsAStepFurther) {
  for (const Given& c : given_scales()) {
    SCOPED_TRACE(c.name);
    Tensor x = weights().requires_grad_();
    fake_quantize(x, c.scale, c.zero, c.grid).sum().backward();
    const GroupMap map(c.grid.grouping, {6, 40});
    Tensor step = torch::empty({6, 40});
    for (int64_t i = 0; i < step.numel(); ++i) step.view(-1)[i] = c.scale.flatten()[map.group_of(i)];
    const torch::NoGradGuard no_gradient;
    const auto at = [&](const Tensor& values) { return fake_quantize(values, c.scale, c.zero, c.grid); };
    const Tensor ahead = at(x + step), behind = at(x - step), here = at(x), slope = (ahead - behind) / (2 * step);
    // At the range's ends one of the sides stays where it was.
    const Tensor end = (ahead == here).logical_xor(behind == here);
    EXPECT_LE((slope - x.grad()).masked_select(end.logical_not()).abs().max().item<float>(), 1e-4);
    EXPECT_GT((x.grad() == 1).logical_and(end.logical_not()).sum().item<int64_t>(), 10);
    EXPECT_GT((x.grad() == 0).sum().item<int64_t>(), 0);
  }
}

/// Of codes that are no integers, from one end of the range to the other: their values are as far apart as what they
/// stand for, but for half a gap at either end.
TEST(FakeQuantize, TablesAndFloatsRiseAsTheirValuesDo) {
  for (const Named& c : schemes()) {
    if (integer_grid(c.scheme)) continue;
    SCOPED_TRACE(c.name);
    const Tensor w = weights();
    const float most = w.abs().max().item<float>(), h = 0.5f * most;
    for (int64_t i = 0; i < w.size(1); i += 20) w.select(1, i).fill_(most), w.select(1, i + 1).fill_(-most);
    const auto at = [&](float value) {
      Tensor x = w.clone();
      x.slice(1, 5, 15).fill_(value);
      x.requires_grad_();
      const Tensor y = fake_quantize(x, quantizer(c.scheme));
      y.sum().backward();
      EXPECT_TRUE(torch::equal(x.grad(), torch::ones_like(x)));
      return y.detach()[0].slice(0, 5, 15).clone();
    };
    float gap = 0;  // the largest between neighbouring values
    std::vector<float> values;
    for (int i = -100; i <= 100; ++i) values.push_back(at(most * static_cast<float>(i) / 100)[0].item<float>());
    for (size_t i = 1; i < values.size(); ++i) {
      EXPECT_GE(values[i], values[i - 1]);
      gap = std::max(gap, values[i] - values[i - 1]);
    }
    ASSERT_LT(gap, h);
    for (const float centre : {-0.4f, 0.0f, 0.3f}) {
      const Tensor slope = (at(centre * most + h) - at(centre * most - h)) / (2 * h);
      EXPECT_LE((slope - 1).abs().max().item<float>(), gap / (2 * h) + 1e-2f);
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

/// What inputs of layers may be: integers with and without a zero point, and floats.
std::vector<Named> activation_schemes(const Grouping& grouping) {
  std::vector<Named> all;
  for (const int bits : {8, 4})
    for (const bool symmetric : {true, false}) {
      Scheme s = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(DType::f32))};
      if (!symmetric) {
        s.offset_kind = OffsetKind::zero_point;
        s.offset = parameter(grouping, {.element = s.element});
      }
      all.push_back({describe(s), s});
    }
  for (const DType type : {DType::f8_e4m3, DType::f8_e5m2}) {
    const Scheme s = {.element = &float_element(type), .scale = parameter(grouping, plain(DType::f32))};
    all.push_back({describe(s), s});
  }
  return all;
}

TEST(FakeQuantize, DynamicActivationsHaveAScaleATokenAndGoStraightThrough) {
  torch::manual_seed(3);
  const Tensor base = torch::randn({2, 5, 16}) * torch::tensor({1.0f, 30.0f}).reshape({2, 1, 1});
  for (const Named& c : activation_schemes(Grouping::channel())) {
    SCOPED_TRACE(c.name);
    Tensor x = base.clone().requires_grad_();
    const Tensor y = fake_quantize_activation(x, {.scheme = c.scheme}), slope = torch::randn_like(base);
    // Half a step of the token's own range: of floats half a mantissa's last bit.
    const float codes = c.scheme.element->kind == ElementKind::integer ? c.scheme.element->highest : 8;
    EXPECT_LE(((y - x).abs() / base.abs().amax(-1, true)).max().item<float>(), 1.01f / codes);
    EXPECT_FALSE(torch::equal(y, x));
    (y * slope).sum().backward();
    EXPECT_TRUE(torch::equal(x.grad(), slope));
  }
  const Tensor integers =
      fake_quantize_activation(base, {.scheme = activation_schemes(Grouping::channel()).front().scheme});
  const Tensor steps = integers / (base.abs().amax(-1, true) / 127);
  EXPECT_LT((steps - steps.round()).abs().max().item<float>(), 1e-3);
}

TEST(FakeQuantize, StaticActivationsClipWhatIsBeyondTheirRange) {
  torch::manual_seed(3);
  const Tensor x = torch::randn({2, 50, 16});
  for (const Named& c : activation_schemes(Grouping::tensor()))
    for (const Range range : {Range{-1, 1}, Range{-0.5f, 1.5f}}) {
      SCOPED_TRACE(c.name);
      Tensor input = x.clone().requires_grad_();
      const Tensor slope = torch::randn_like(x), y = fake_quantize_activation(input, fixed_activation(c.scheme, range));
      (y * slope).sum().backward();
      // What the codes reach: without a zero point as far down as up, and a code further where there is one.
      const bool has_zero = c.scheme.offset.has_value();
      const float most = std::max(-range.low, range.high), codes = c.scheme.element->highest;
      const float low = has_zero ? range.low : -most, high = has_zero ? range.high : most;
      const bool integer = c.scheme.element->kind == ElementKind::integer;
      const float edge = integer ? 1.6f * (high - low) / codes : 0.01f;
      const Tensor inside = (x > low + edge).logical_and(x < high - edge);
      const Tensor beyond = (x < low - edge).logical_or(x > high + edge);
      EXPECT_GT(inside.sum().item<int64_t>(), 500);
      EXPECT_GT(beyond.sum().item<int64_t>(), 20);
      EXPECT_TRUE(torch::equal(input.grad().masked_select(inside), slope.masked_select(inside)));
      EXPECT_EQ(input.grad().masked_select(beyond).abs().max().item<float>(), 0);
      EXPECT_LE(y.max().item<float>(), high + edge);
      EXPECT_GE(y.min().item<float>(), low - edge);
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
