#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/memory_checkpoint.hpp"

namespace bitwright {
namespace {

using namespace test;

Scheme eight_bits(const Grouping& grouping, bool asymmetric = false) {
  Scheme s = {.element = &integer_element(8, true), .scale = parameter(grouping, plain(DType::f32))};
  if (asymmetric) {
    s.offset_kind = OffsetKind::zero_point;
    s.offset = parameter(grouping, {.element = s.element});
  }
  return s;
}

std::shared_ptr<const QuantizedTensor> number(const Scheme& scheme, const Shape& shape, float value) {
  return std::make_shared<const QuantizedTensor>(encode(scheme, shape, std::span(&value, 1)));
}

StoredTensor layer() {
  StoredTensor t = {.name = "model.layers.0.mlp.up_proj.weight",
                    .shape = {6, 32},
                    .scheme = eight_bits(Grouping::channel()),
                    .value_dtype = DType::bf16};
  t.linear.input = ActivationScheme{.scheme = eight_bits(Grouping::tensor(), true),
                                    .dynamic = false,
                                    .scale = number(plain(DType::f32), {1}, 0.25F),
                                    .offset = number({.element = &integer_element(8, true)}, {1}, -7)};
  t.linear.output = ActivationScheme{.scheme = eight_bits(Grouping::channel())};
  return t;
}

TEST(Native, ActivationsComeBack) {
  const Container& native = *find_container("native");
  const MemoryCheckpoint files = written_by(native, layer(), random_values({6, 32}));
  const StoredTensor read = native.list(files.view()).at(0);
  ASSERT_TRUE(read.linear.input && read.linear.output);
  EXPECT_EQ(read.linear.input->scheme, layer().linear.input->scheme);
  EXPECT_FALSE(read.linear.input->dynamic);
  EXPECT_EQ(decode(*read.linear.input->scale), std::vector<float>{0.25F});
  EXPECT_EQ(decode(*read.linear.input->offset), std::vector<float>{-7});
  EXPECT_TRUE(read.linear.output->dynamic);
  EXPECT_EQ(read.linear.output->scale, nullptr);
  check_comes_back(native, layer(), encoded(native, layer(), random_values({6, 32})));
  check_damage(native, files);
  check_damaged_json(files);
}

/// Whoever made the number may have given it no dimension.
TEST(Native, OneNumberHasOneShape) {
  const Container& native = *find_container("native");
  StoredTensor t = layer();
  t.linear.input->scale = number(plain(DType::f32), {}, 0.5F);
  const MemoryCheckpoint files = written_by(native, t, random_values({6, 32}));
  EXPECT_EQ(decode(*native.list(files.view()).at(0).linear.input->scale), std::vector<float>{0.5F});
}

TEST(Native, WhatIsSaidOfActivationsIsChecked) {
  const Container& native = *find_container("native");
  const MemoryCheckpoint good = written_by(native, layer(), random_values({6, 32}));
  const auto code = [&](auto change) {
    MemoryCheckpoint bad = good;
    change(bad.metadata["tensors"][layer().name]["input"]);
    return code_of_listing(native, bad);
  };
  EXPECT_EQ(code([](Json&) {}), "none");
  EXPECT_EQ(code([](Json& input) { input = 3; }), "bad-metadata");
  EXPECT_EQ(code([](Json& input) { input.erase("scheme"); }), "bad-metadata");
  EXPECT_EQ(code([](Json& input) { input["dynamic"] = "no"; }), "bad-metadata");
  EXPECT_EQ(code([](Json& input) { input["scales"] = {{"element", "float16"}}; }), "bad-container");
  EXPECT_EQ(code([](Json& input) { input["scales"] = {{"element", "float17"}}; }), "bad-scheme");
  MemoryCheckpoint missing = good;
  missing.arrays.erase(layer().name + ".input.scales");
  EXPECT_EQ(code_of_listing(native, missing), "bad-container");
}

}  // namespace
}  // namespace bitwright
