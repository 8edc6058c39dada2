#include "kernels/decode.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"

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

std::vector<Grouping> all_groupings() {
  std::vector<Grouping> all = {Grouping::tensor(),     Grouping::channel(),    Grouping::along(5),
                               Grouping::along(64),    Grouping::along(1),     Grouping::flat(8),
                               Grouping::along(0, -2), Grouping::along(4, -2), Grouping::along(1, -2)};
  all.push_back({.kind = Grouping::Kind::flat, .size = 6, .interleaved = true});
  all.push_back({.kind = Grouping::Kind::block, .block_rows = 4, .block_columns = 7});
  all.push_back({.kind = Grouping::Kind::block, .block_rows = 128, .block_columns = 128});
  all.push_back({.kind = Grouping::Kind::index, .size = 8});
  return all;
}

/// Zero, infinities, NaN, the smallest and largest numbers among others.
std::shared_ptr<const QuantizedTensor> hostile_floats(const Shape& shape, std::mt19937& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kHostile[] = {0.0f,   -0.0f,    kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(),
                                1e-45f, -3.4e38f, 1.5f};
  std::vector<float> values = gaussian(static_cast<size_t>(element_count(shape)));
  for (float& value : values)
    if (random() % 4 == 0) value = kHostile[random() % std::size(kHostile)];
  const auto bytes = std::as_bytes(std::span(values));
  return std::make_shared<const QuantizedTensor>(
      QuantizedTensor{.scheme = plain(DType::f32), .shape = shape, .codes = {bytes.begin(), bytes.end()}});
}

QuantizedTensor hostile(const Scheme& scheme, const Shape& shape, std::mt19937& random) {
  QuantizedTensor t = {.scheme = scheme, .shape = shape};
  for (int64_t i = 0; i < element_count(shape); ++i)
    t.codes.push_back(static_cast<std::byte>(random() % (1u << scheme.element->bits)));
  const Grouping& grouping = scheme.scale->grouping;
  t.scale = hostile_floats(parameter_shape(grouping, shape), random);
  if (scheme.offset) t.offset = hostile_floats(parameter_shape(scheme.offset->grouping, shape), random);
  if (grouping.kind == Grouping::Kind::index)
    for (int64_t k = 0; k < shape.back(); ++k)
      t.group_index.push_back(
          static_cast<int32_t>(random() % static_cast<size_t>(parameter_shape(grouping, shape).back())));
  return t;
}

std::vector<Scheme> with_offsets(const Scheme& scheme) {
  std::vector<Scheme> all = {scheme};
  for (const OffsetKind kind : {OffsetKind::zero_point, OffsetKind::float_zero, OffsetKind::bias, OffsetKind::minimum})
    for (const Grouping& grouping : {scheme.scale->grouping, Grouping::flat(INT64_MAX), Grouping::flat(3)}) {
      if (grouping != scheme.scale->grouping && kind != OffsetKind::bias) continue;
      all.push_back(scheme);
      all.back().offset_kind = kind;
      all.back().offset = parameter(grouping, plain(DType::f32));
    }
  all.push_back(scheme);
  all.back().offset_kind = OffsetKind::shift;
  all.back().shift = 8;
  const size_t multiplying = all.size();
  for (size_t i = 0; i < multiplying; ++i) {
    all.push_back(all[i]);
    all.back().scale->divides = true;
    all.back().factor = 1.0f / 3;
  }
  return all;
}

void expect_same(std::span<const float> values, std::span<const float> expected, const std::string& what) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i]) && std::isnan(expected[i])) continue;  // which NaN comes of two is nowhere said
    ASSERT_EQ(std::bit_cast<uint32_t>(values[i]), std::bit_cast<uint32_t>(expected[i])) << what << " at " << i;
  }
}

TEST(KernelsDecode, IsTheDefinitionForEveryOffsetAndGrouping) {
  std::mt19937 random(7);
  for (const Shape& shape : {Shape{12, 1}, Shape{6, 43}, Shape{2, 9, 130}, Shape{3, 2, 1027}})
    for (const char* element : {"uint4", "int8", "nf4", "float8_e4m3"})
      for (const Grouping& grouping : all_groupings())
        for (const Scheme& scheme :
             with_offsets({.element = find_element(element), .scale = parameter(grouping, plain(DType::f32))})) {
          const QuantizedTensor t = hostile(scheme, shape, random);
          const std::vector<float> expected = decode(t);
          for (const KernelLevel& level : kernel_levels()) {
            if (!level.usable()) continue;
            const std::string what = std::string(level.name) + ' ' + to_json(scheme).dump() + ' ' + to_string(shape);
            std::vector<float> values(expected.size());
            decode(t, values, level);
            expect_same(values, expected, what);
            const RangeDecoder decoder(t, level);
            const size_t begin = random() % values.size(), count = random() % (values.size() - begin) + 1;
            decoder.decode(static_cast<int64_t>(begin), std::span(values).first(count));
            expect_same(std::span(values).first(count), std::span(expected).subspan(begin), what);
            if (HasFatalFailure()) return;
          }
        }
}

TEST(KernelsDecode, NestedParametersAndPlainCodes) {
  Scheme nested = {.element = find_element("dynamic8"), .scale = parameter(Grouping::flat(16), plain(DType::f32))};
  nested.offset_kind = OffsetKind::bias;
  nested.offset = parameter(Grouping::tensor(), plain(DType::f32));
  Scheme divided = {.element = find_element("float8_e4m3"), .scale = parameter(Grouping::tensor(), plain(DType::f32))};
  divided.scale->divides = true;
  const Shape shape = {10, 133};
  const std::vector<float> values = gaussian(1330);
  for (const Scheme& scale : {nested, divided, plain(DType::f8_e4m3), plain(DType::f8_e8m0), plain(DType::bf16)}) {
    const Scheme scheme = {.element = find_element("float4_e2m1"), .scale = parameter(Grouping::along(16), scale)};
    QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(1330)};
    for (size_t i = 0; i < 1330; ++i) t.codes[i] = static_cast<std::byte>(i * 7 % 16);
    const Shape scales_shape = parameter_shape(Grouping::along(16), shape);
    std::vector<float> scales(static_cast<size_t>(element_count(scales_shape)));
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = std::fabs(values[i]) + 0.001f;
    Scheme multiplying = scale;  // the others have no encoder
    if (multiplying.scale) multiplying.scale->divides = false;
    QuantizedTensor stored = encode(multiplying, scales_shape, scales);
    stored.scheme = scale;
    t.scale = std::make_shared<const QuantizedTensor>(std::move(stored));
    std::vector<float> decoded(values.size());
    for (const KernelLevel& level : kernel_levels()) {
      if (!level.usable()) continue;
      decode(t, decoded, level);
      EXPECT_EQ(decoded, decode(t)) << level.name << ' ' << describe(scheme);
      std::vector<float> decoded_scales(scales.size());
      decode(*t.scale, decoded_scales, level);
      EXPECT_EQ(decoded_scales, decode(*t.scale)) << level.name << ' ' << describe(scale);
    }
  }
}

TEST(KernelsDecode, RefusesAGroupIndexThatIsOutOfRange) {
  std::mt19937 random(7);
  const Grouping grouping = {.kind = Grouping::Kind::index, .size = 8};
  QuantizedTensor t =
      hostile({.element = find_element("uint4"), .scale = parameter(grouping, plain(DType::f32))}, {3, 20}, random);
  t.group_index[4] = 3;
  EXPECT_THROW(RangeDecoder{t}, Error);
  t.group_index.pop_back();
  EXPECT_THROW(RangeDecoder{t}, Error);
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
