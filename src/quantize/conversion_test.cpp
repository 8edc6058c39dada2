#include "quantize/conversion.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <iostream>
#include <set>

#include "base/error.hpp"
#include "recipe/recipe.hpp"
#include "scheme/regrid.hpp"
#include "tests/memory_checkpoint.hpp"

namespace bitwright {
namespace {

using namespace test;

/// What each container writes at a shape, by its table of choices.
std::vector<std::pair<const Container*, Scheme>> all_schemes(const Shape& shape, DType dtype) {
  std::vector<std::pair<const Container*, Scheme>> all;
  for (const Container* container : all_containers()) {
    if (container->write_metadata == nullptr) continue;
    for (SchemeChoice choice : container->choices)
      for (const int64_t size : std::set<int64_t>{choice.group_size, 32, 64}) {
        if (!choice.name.empty() && size != choice.group_size) continue;  // a file type is as it is
        if (choice.group_size != 0) choice.group_size = size;
        const Scheme scheme = container->scheme_for != nullptr ? container->scheme_for(choice, {}, shape)
                                                               : scheme_of(choice, *container, dtype);
        if (scheme.is_plain()) continue;  // a file type of floats
        if (container->fit(scheme, shape).verdict != Verdict::impossible) all.emplace_back(container, scheme);
      }
  }
  return all;
}

struct Distance {
  double most = 0, largest = 0;
};
/// By the definition of decoding, not by the kernels that the planner uses.
Distance distance(const QuantizedTensor& a, const QuantizedTensor& b) {
  const std::vector<float> x = decode(a), y = decode(b);
  Distance d;
  for (size_t i = 0; i < x.size(); ++i) {
    d.most = std::max(d.most, std::fabs(double{x[i]} - double{y[i]}));
    d.largest = std::max(d.largest, std::fabs(double{x[i]}));
  }
  return d;
}

TEST(Regrid, EveryPairOfEveryContainerMovesNoValueByMoreThanHalfAStep) {
  size_t made = 0, exact = 0;
  for (const Shape& shape : {Shape{32, 128}, Shape{32, 64}}) {
    const auto schemes = all_schemes(shape, DType::f16);
    std::vector<Scheme> targets;
    for (const auto& [container, scheme] : schemes)
      if (std::ranges::find(targets, scheme) == targets.end()) targets.push_back(scheme);
    std::vector<Scheme> sources;
    for (const auto& [container, scheme] : schemes) {
      if (std::ranges::find(sources, scheme) != sources.end()) continue;
      sources.push_back(scheme);
      const StoredTensor tensor = {
          .name = "up_proj.weight", .shape = shape, .scheme = scheme, .value_dtype = DType::f16};
      QuantizedTensor from;
      try {
        from = encoded(*container, tensor, random_values(shape));
      } catch (const Error& error) {  // GGUF's types that an algorithm searches for; they are in the matrix
        EXPECT_EQ(error.code(), "bad-scheme");
        continue;
      }
      for (const Scheme& to : targets) {
        SCOPED_TRACE(fmt::format("{} -> {}", describe(scheme), describe(to)));
        const Regridded result = regrid(from, to);
        EXPECT_EQ(result.tensor.has_value(), result.reason.empty());
        if (!result.tensor) continue;
        ++made;
        EXPECT_TRUE(result.tensor->scheme == to);
        EXPECT_NO_THROW(check_sizes(*result.tensor, "result"));
        const Distance d = distance(from, *result.tensor);
        EXPECT_LE(d.most, d.largest * std::ldexp(1.0, -scheme.element->bits + 1));
        EXPECT_EQ(d.most, max_abs_difference(from, *result.tensor));
        if (d.most == 0) ++exact;
        if (scheme == to) {
          EXPECT_TRUE(*result.tensor == from);
        }
      }
    }
  }
  EXPECT_GT(exact, 100U);
  std::cout << "cases: " << made << ", exact: " << exact << '\n';
}

Scheme affine(int bits, const Grouping& grouping, DType scales, OffsetKind kind, const Scheme& offsets) {
  return {.element = &integer_element(bits, false),
          .scale = parameter(grouping, plain(scales)),
          .offset_kind = kind,
          .offset = parameter(grouping, offsets)};
}

const Shape kShape = {32, 128};

QuantizedTensor awq_like() {
  const Scheme scheme =
      affine(4, Grouping::along(128), DType::f16, OffsetKind::zero_point, {.element = &integer_element(4, false)});
  return encode(scheme, kShape, random_values(kShape));
}

double difference(const QuantizedTensor& from, const Scheme& to) {
  const Regridded result = regrid(from, to);
  EXPECT_TRUE(result.tensor) << result.reason;
  return result.tensor ? distance(from, *result.tensor).most : INFINITY;
}

TEST(Regrid, ZeroPointsBecomeBiasesExactlyInF32) {
  const QuantizedTensor from = awq_like();
  const Grouping groups = Grouping::along(32);
  const auto mlx = [&](DType dtype) { return affine(4, groups, dtype, OffsetKind::bias, plain(dtype)); };
  EXPECT_EQ(difference(from, mlx(DType::f32)), 0);
  const double rounded = difference(from, mlx(DType::f16));
  EXPECT_GT(rounded, 0);
  EXPECT_LT(rounded, 1e-2);
  EXPECT_EQ(difference(from, affine(4, groups, DType::f16, OffsetKind::float_zero, plain(DType::f16))), 0);
}

TEST(Regrid, NarrowZeroPointsBecomeSignedCodesOfMoreBits) {
  const Scheme wide = {.element = &integer_element(8, true),
                       .scale = parameter(Grouping::along(32), plain(DType::f16))};
  EXPECT_EQ(difference(awq_like(), wide), 0);
  Scheme narrow = wide;
  narrow.element = &integer_element(4, true);
  EXPECT_FALSE(regrid(awq_like(), narrow).tensor);
}

TEST(Regrid, GroupsOfDifferentScalesAreNotMerged) {
  const Scheme fine = {.element = &integer_element(4, true),
                       .scale = parameter(Grouping::along(32), plain(DType::f16))};
  Scheme coarse = fine;
  coarse.scale->grouping.size = 128;
  EXPECT_FALSE(regrid(encode(fine, kShape, random_values(kShape)), coarse).tensor);
  const QuantizedTensor whole = encode(coarse, kShape, random_values(kShape));
  const Regridded split = regrid(whole, fine);
  ASSERT_TRUE(split.tensor);
  const Regridded merged = regrid(*split.tensor, coarse);
  ASSERT_TRUE(merged.tensor);
  EXPECT_TRUE(*merged.tensor == whole);
}

}  // namespace
}  // namespace bitwright
