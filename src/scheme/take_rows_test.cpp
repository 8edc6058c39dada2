#include "scheme/take_rows.hpp"

#include <gtest/gtest.h>

#include <random>

namespace bitwright {
namespace {

std::vector<float> random_values(const Shape& shape) {
  std::mt19937 random(3);
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& v : values) v = static_cast<float>(static_cast<int>(random() % 4001) - 2000) / 700;
  return values;
}

Scheme int4(const Grouping& grouping, DType scale) {
  return {.element = &integer_element(4, true), .scale = parameter(grouping, plain(scale))};
}

std::vector<Scheme> schemes() {
  const ElementType* const uint4 = &integer_element(4, false);
  const Scheme nested = {.element = &float_element(DType::f8_e4m3),
                         .scale = parameter(Grouping::tensor(), plain(DType::f32))};
  return {plain(DType::f16),
          plain(DType::f8_e4m3),
          int4(Grouping::tensor(), DType::f32),
          int4(Grouping::channel(), DType::f16),
          int4(Grouping::along(8), DType::f16),
          int4(Grouping::along(7), DType::bf16),  // the last group of a row is shorter
          {.element = &integer_element(4, true), .scale = parameter(Grouping::along(8), nested)},
          {.element = uint4,
           .scale = parameter(Grouping::along(8), plain(DType::f16)),
           .offset_kind = OffsetKind::zero_point,
           .offset = parameter(Grouping::along(8), {.element = uint4})},
          {.element = find_element("nf4"), .scale = parameter(Grouping::flat(12), plain(DType::f32))},
          {.element = find_element("nf4"), .scale = parameter(Grouping::flat(48), plain(DType::f32))},
          int4({.kind = Grouping::Kind::block, .block_rows = 3, .block_columns = 10}, DType::f32)};
}

TEST(SchemeTakeRows, DecodeToTheSameBits) {
  const std::vector<int64_t> rows = {11, 0, 1, 2, 7, 7, 5};
  for (const Shape& shape : {Shape{12, 24}, Shape{3, 4, 24}})
    for (const Scheme& scheme : schemes()) {
      SCOPED_TRACE(describe(scheme) + to_string(shape));
      const QuantizedTensor whole = encode(scheme, shape, random_values(shape));
      const std::optional<QuantizedTensor> taken = take_rows(whole, rows);
      ASSERT_TRUE(taken.has_value());
      check_sizes(*taken, "taken");
      const std::vector<float> all = decode(whole), some = decode(*taken);
      ASSERT_EQ(some.size(), rows.size() * 24);
      for (size_t i = 0; i < some.size(); ++i)
        ASSERT_EQ(some[i], all[static_cast<size_t>(rows[i / 24]) * 24 + i % 24]) << i;
    }
}

TEST(SchemeTakeRows, GroupIndex) {
  const Shape shape = {6, 8};
  QuantizedTensor whole = encode(int4(Grouping::along(4), DType::f32), shape, random_values(shape));
  whole.scheme.scale->grouping = {.kind = Grouping::Kind::index, .size = 4};
  whole.group_index = {1, 0, 0, 1, 1, 0, 1, 0};
  const std::vector<int64_t> rows = {4, 1};
  const std::optional<QuantizedTensor> taken = take_rows(whole, rows);
  ASSERT_TRUE(taken.has_value());
  const std::vector<float> all = decode(whole), some = decode(*taken);
  for (size_t i = 0; i < some.size(); ++i) ASSERT_EQ(some[i], all[static_cast<size_t>(rows[i / 8]) * 8 + i % 8]);
}

TEST(SchemeTakeRows, GroupsAcrossRows) {
  const Shape shape = {6, 10};
  const std::vector<int64_t> rows = {1};
  for (const Grouping& grouping : {Grouping::flat(4), Grouping::along(3, -2)}) {
    const QuantizedTensor whole = encode(int4(grouping, DType::f32), shape, random_values(shape));
    EXPECT_FALSE(take_rows(whole, rows).has_value());
  }
}

}  // namespace
}  // namespace bitwright
