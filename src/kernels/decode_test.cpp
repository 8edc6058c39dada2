#include "kernels/decode.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

namespace bitwright {
namespace {

std::vector<float> gaussian(size_t count) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all;
  for (const Grouping& grouping : {Grouping::tensor(), Grouping::channel(), Grouping::along(5), Grouping::along(64),
                                   Grouping::flat(8), Grouping::flat(64), Grouping::along(0, -2)}) {
    for (const ElementType* element : all_elements()) {
      if (element->bits > 8 || element->name == "float8_e8m0") continue;
      all.push_back({.element = element, .scale = parameter(grouping, plain(DType::f16))});
      if (element->kind != ElementKind::integer) continue;
      all.push_back(all.back());
      all.back().offset_kind = OffsetKind::zero_point;
      all.back().offset = parameter(grouping, {.element = element});
    }
  }
  return all;
}

TEST(KernelsDecode, IsTheDefinition) {
  for (const int64_t columns : {1, 7, 63, 64, 65, 515}) {
    const Shape shape = {9, columns};
    const auto count = static_cast<size_t>(9 * columns);
    const std::vector<float> values = gaussian(count);
    for (const Scheme& scheme : schemes()) {
      QuantizedTensor t = encode(scheme, shape, values);
      for (const float factor : {1.0f, 1.0f / 127}) {
        t.scheme.factor = factor;
        const std::vector<float> expected = decode(t);
        for (const KernelLevel& level : kernel_levels()) {
          if (!level.usable()) continue;
          const RangeDecoder decoder(t, level);
          for (size_t begin = 0; begin < count; begin = begin * 2 + 3) {
            std::vector<float> out(std::min(count - begin, begin % 7 * 40 + 1) + 1, -7.0f);
            decoder.decode(static_cast<int64_t>(begin), std::span(out).first(out.size() - 1));
            ASSERT_EQ(std::memcmp(out.data(), &expected[begin], (out.size() - 1) * sizeof(float)), 0)
                << level.name << ' ' << describe(scheme) << ' ' << columns << " from " << begin;
            ASSERT_EQ(out.back(), -7.0f);  // what stands behind has not changed
          }
        }
      }
    }
  }
}

TEST(KernelsDecode, ErrorsAreTheSameOnEveryLevelAndRight) {
  const Shape shape = {131, 1003};
  const std::vector<float> values = gaussian(131 * 1003);
  const Scheme scheme = {.element = &integer_element(4, true),
                         .scale = parameter(Grouping::along(64), plain(DType::f16))};
  const QuantizedTensor t = encode(scheme, shape, values);
  const std::vector<float> decoded = decode(t);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32, DType::f64}) {
    std::vector<std::byte> bytes(values.size() * size_bytes(dtype));
    from_f32(dtype, values, bytes);
    std::vector<float> original(values.size());
    to_f32(dtype, bytes, original);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < original.size(); ++i) {
      difference += std::pow(double{original[i]} - double{decoded[i]}, 2);
      norm += std::pow(double{original[i]}, 2);
    }
    const double expected = relative_error({dtype, bytes}, t, find_kernel_level("scalar"));
    EXPECT_NEAR(expected, std::sqrt(difference / norm), 1e-12);
    for (const KernelLevel& level : kernel_levels()) {
      if (!level.usable()) continue;
      EXPECT_EQ(relative_error({dtype, bytes}, t, level), expected) << level.name;
    }
  }
}

TEST(KernelsDecode, ErrorOfNothing) {
  const Scheme scheme = {.element = &integer_element(8, true),
                         .scale = parameter(Grouping::channel(), plain(DType::f32))};
  const std::vector<float> zeros(40);
  const QuantizedTensor t = encode(scheme, {2, 20}, zeros);
  EXPECT_EQ(relative_error({DType::f32, std::as_bytes(std::span(zeros))}, t), 0);
}

}  // namespace
}  // namespace bitwright
