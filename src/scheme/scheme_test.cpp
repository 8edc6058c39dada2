#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "base/error.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {
namespace {

std::vector<float> gaussian(size_t count, uint32_t seed = 1, float deviation = 0.02f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

Scheme integer_scheme(int bits, bool symmetric, const Grouping& grouping, DType scale) {
  Scheme scheme = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(scale))};
  if (symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

Scheme nested_absmax() {
  return {.element = find_element("dynamic8"),
          .scale = parameter(Grouping::flat(256), plain(DType::f32)),
          .offset_kind = OffsetKind::bias,
          .offset = parameter(Grouping::tensor(), plain(DType::f32))};
}

std::vector<Grouping> groupings() {
  return {Grouping::tensor(),
          Grouping::channel(),
          Grouping::along(0, -2),
          Grouping::along(5),
          Grouping::along(32),
          Grouping::along(4, -2),
          Grouping::flat(64),
          {.kind = Grouping::Kind::flat, .size = 3, .interleaved = true},
          {.kind = Grouping::Kind::block, .block_rows = 2, .block_columns = 16}};
}

// Two views of a group (the elements of group g, the group of element i) must be the same partition.
TEST(Grouping, RunsAndLookupsAgree) {
  for (const Shape& shape : {Shape{6, 33}, Shape{1, 1}, Shape{3, 6, 17}, Shape{7, 64}})
    for (const Grouping& grouping : groupings()) {
      if (grouping.interleaved && element_count(shape) % grouping.size != 0) continue;
      const GroupMap map(grouping, shape);
      EXPECT_EQ(map.group_count(), element_count(parameter_shape(grouping, shape)));
      std::vector<int> seen(static_cast<size_t>(element_count(shape)));
      for (int64_t g = 0; g < map.group_count(); ++g)
        map.for_each_run(g, [&](GroupMap::Run run) {
          for (int64_t j = 0; j < run.count; ++j) {
            const int64_t i = run.start + j * run.stride;
            ASSERT_EQ(map.group_of(i), g);
            ++seen[static_cast<size_t>(i)];
          }
        });
      for (const int count : seen) ASSERT_EQ(count, 1);
      for (int64_t i = 0; i < element_count(shape); i += map.run_length(i)) {
        ASSERT_GE(map.run_length(i), 1);
        ASSERT_EQ(map.group_of(i + map.run_length(i) - 1), map.group_of(i));
      }
    }
}

TEST(Grouping, IndexedColumns) {
  const Grouping grouping = {.kind = Grouping::Kind::index, .size = 2};
  const GroupMap map(grouping, {2, 4}, {1, 0, 1, 0});
  EXPECT_EQ(map.group_of(0), 1);
  EXPECT_EQ(map.group_of(5), 2);
  EXPECT_THROW(GroupMap(grouping, {2, 4}, {1, 0, 2, 0}), Error);
  EXPECT_THROW(GroupMap(grouping, {2, 4}, {1, 0}), Error);
}

// Every integer scheme: codes in range, each value within half a step of what was stored (a step and a half where the
// zero point is rounded and clamps an end), and encoding what was decoded changes nothing.
TEST(Scheme, IntegersDecodeWithinHalfAStep) {
  const Shape shape = {6, 33};
  const std::vector<float> values = gaussian(6 * 33);
  for (int bits = 2; bits <= 8; ++bits)
    for (const bool symmetric : {true, false})
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        for (const Grouping& grouping : groupings()) {
          if (grouping.interleaved && element_count(shape) % grouping.size != 0) continue;
          const Scheme scheme = integer_scheme(bits, symmetric, grouping, dtype);
          SCOPED_TRACE(describe(scheme));
          const QuantizedTensor t = encode(scheme, shape, values);
          check_sizes(t, "t");
          const std::vector<float> decoded = decode(t), scales = decode(*t.scale);
          const GroupMap map(grouping, shape);
          const float rounding = dtype == DType::f32 ? 1e-5f : dtype == DType::f16 ? 2e-3f : 2e-2f;
          for (size_t i = 0; i < values.size(); ++i) {
            const float step = scales[static_cast<size_t>(map.group_of(static_cast<int64_t>(i)))];
            const float half = (symmetric ? 0.5f : 1.0f) * step;
            const float clip = rounding * step * std::ldexp(1.0f, bits);  // the scale's own rounding moves the ends
            ASSERT_LE(std::fabs(decoded[i] - values[i]), half * 1.001f + clip) << i;
          }
          EXPECT_EQ(decode(encode(scheme, shape, decoded)).size(), decoded.size());
        }
}

TEST(Scheme, IntegersByHand) {
  const Scheme symmetric = integer_scheme(8, true, Grouping::channel(), DType::f32);
  const std::vector<float> row = {-1.27f, 0.005f, 0.635f, 1.0f};
  const QuantizedTensor s = encode(symmetric, {1, 4}, row);
  EXPECT_EQ(std::to_integer<int8_t>(s.codes[0]), -127);
  EXPECT_EQ(std::to_integer<int8_t>(s.codes[3]), 100);
  const Scheme asymmetric = integer_scheme(4, false, Grouping::channel(), DType::f32);
  const QuantizedTensor a = encode(asymmetric, {1, 4}, std::vector<float>{-0.5f, 0, 1, 0.25f});
  EXPECT_FLOAT_EQ(decode(*a.scale).at(0), 0.1f);
  EXPECT_EQ(decode(*a.offset).at(0), 5);
  EXPECT_EQ(std::to_integer<int>(a.codes[0]), 0);
  EXPECT_EQ(std::to_integer<int>(a.codes[1]), 5);
  EXPECT_EQ(std::to_integer<int>(a.codes[2]), 15);
  EXPECT_EQ(decode(a).at(1), 0.0f);  // zero is always exact
}

TEST(Scheme, ZerosAndConstantsStayExact) {
  const std::vector<float> zeros(64, 0.0f);
  for (const Scheme& scheme :
       {integer_scheme(4, false, Grouping::along(32), DType::f16),
        integer_scheme(8, true, Grouping::tensor(), DType::f16),
        Scheme{.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))}})
    EXPECT_EQ(decode(encode(scheme, {2, 32}, zeros)), zeros) << describe(scheme);
}

TEST(Scheme, NestedScalesAreClose) {
  const std::vector<float> values = gaussian(128 * 512);
  const Scheme flat = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))};
  const Scheme nested = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), nested_absmax())};
  const QuantizedTensor a = encode(flat, {128, 512}, values), b = encode(nested, {128, 512}, values);
  check_sizes(b, "b");
  EXPECT_EQ(a.codes, b.codes);
  const std::vector<float> scale_a = decode(*a.scale), scale_b = decode(*b.scale);
  for (size_t g = 0; g < scale_a.size(); ++g) ASSERT_NEAR(scale_a[g], scale_b[g], 0.001f);
}

TEST(Scheme, RefusesWhatCannotBeStored) {
  const Scheme scheme = integer_scheme(8, true, Grouping::channel(), DType::f16);
  const auto code = [&](std::vector<float> values) {
    try {
      encode(scheme, {1, static_cast<int64_t>(values.size())}, values);
    } catch (const Error& error) {
      return error.code();
    }
    return std::string("none");
  };
  EXPECT_EQ(code({1, NAN}), "not-finite");
  EXPECT_EQ(code({1, -INFINITY}), "not-finite");
  EXPECT_EQ(code({1, 1e9f}), "scale-overflow");
  EXPECT_EQ(code({1e-30f, 0}), "none");  // a scale below float16's smallest becomes 0, the values too
}

TEST(Scheme, JsonRoundTripsAndRefusesTheRest) {
  const std::vector<Scheme> schemes = {
      plain(DType::bf16),
      integer_scheme(4, false, Grouping::along(32), DType::f16),
      integer_scheme(8, true, Grouping::tensor(), DType::f32),
      {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), nested_absmax())},
      {.element = &integer_element(4, false),
       .scale = parameter(Grouping::along(32), plain(DType::f16)),
       .offset_kind = OffsetKind::shift,
       .shift = 8},
      {.element = &integer_element(8, true),
       .scale = parameter(Grouping::channel(), plain(DType::f32)),
       .factor = 1.0f / 127}};
  for (const Scheme& scheme : schemes) {
    const std::string text = to_json(scheme).dump();
    EXPECT_TRUE(scheme_from_json(Json::parse(text), "t") == scheme) << text;
  }
  for (const char* text :
       {"{}", "[]", R"({"element":"int9"})", R"({"element":"int8","extra":1})", R"({"element":"int8","scale":{}})",
        R"({"element":"int8","offset_kind":"bias"})", R"({"element":"int8","shift":"8"})",
        R"({"element":"int8","scale":{"grouping":{"kind":"axis","size":-1},"scheme":{"element":"float16"}}})"})
    EXPECT_THROW(scheme_from_json(Json::parse(text), "t"), Error) << text;
}

TEST(Scheme, BlocksAndExpertsDecodeByTheirGroup) {
  const Grouping block = {.kind = Grouping::Kind::block, .block_rows = 2, .block_columns = 2};
  const Scheme scheme = {.element = &float_element(DType::f8_e4m3), .scale = parameter(block, plain(DType::f32))};
  const std::vector<float> values = gaussian(2 * 3 * 5, 7, 1.0f);
  const QuantizedTensor t = encode(scheme, {2, 3, 5}, values);
  EXPECT_EQ(t.scale->shape, (Shape{2, 2, 3}));
  const std::vector<float> decoded = decode(t);
  for (size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(decoded[i], values[i], 0.07f * std::fabs(values[i]) + 1e-3f);
}

TEST(Scheme, DecoderGivesPieces) {
  const std::vector<float> values = gaussian(7 * 33);
  const QuantizedTensor t = encode(integer_scheme(3, false, Grouping::along(5), DType::f16), {7, 33}, values);
  const std::vector<float> whole = decode(t);
  const Decoder decoder(t);
  for (const int64_t begin : {0, 1, 32, 33, 100})
    for (const size_t count : {1u, 4u, 60u}) {
      std::vector<float> piece(count);
      decoder.decode(begin, piece);
      for (size_t i = 0; i < count; ++i) ASSERT_EQ(piece[i], whole[static_cast<size_t>(begin) + i]);
    }
}

}  // namespace
}  // namespace bitwright
