#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <iostream>
#include <numeric>
#include <set>

#include "base/error.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_rounding.hpp"
#include "container/gguf_types.hpp"
#include "tests/golden_cases.hpp"

namespace bitwright {
namespace {

using namespace test;

TEST(GgufTypes, AreOneEach) {
  std::set<uint32_t> ids;
  std::set<std::string_view> names;
  for (const GgufType& type : all_gguf_types()) {
    EXPECT_TRUE(ids.insert(type.id).second && names.insert(type.block.name).second) << type.block.name;
    EXPECT_EQ(find_gguf_type(type.id), &type);
    EXPECT_EQ(find_gguf_type(type.block.name), &type);
    const ArraySpec spec = {
        "a", type.dtype.value_or(DType::u8), {type.block.elements}, type.dtype ? nullptr : &type.block};
    EXPECT_EQ(gguf_type_of(spec), &type) << type.block.name;
    EXPECT_EQ(spec.bytes(), type.block.bytes) << type.block.name;
  }
  EXPECT_EQ(gguf_type_of({"a", DType::u8, {1}}), nullptr);
}

// Block sizes and bytes as ggml's own files state them, for every folder golden/gguf_TYPE.
TEST(Golden, gguf_block_sizes) {
  size_t cases = 0;
  for (const GgufType& type : all_gguf_types()) {
    std::string folder = "gguf_";
    for (const char c : type.block.name) folder += static_cast<char>(std::tolower(c));
    for (const GoldenCase& c : golden_cases(folder, "data")) {
      SCOPED_TRACE(folder + "/" + c.name);
      EXPECT_EQ(c.params["ggml_type"], type.id);
      EXPECT_EQ(c.params["block_size"], type.block.elements);
      EXPECT_EQ(c.params["type_size"], type.block.bytes);
      ++cases;
    }
  }
  if (cases == 0) GTEST_SKIP() << "no golden cases here";
  std::cout << "cases: " << cases << '\n';
}

/// What ggml made of the case's input, from the input.
void check_rounding(const GoldenCase& c, const QuantizedTensor& expected) {
  const StoredArray& input = c.at("input");
  const std::vector<float> importance = c.find("imatrix") == nullptr ? std::vector<float>() : c.floats("imatrix");
  const QuantizedTensor t = round_to_gguf(expected.scheme, expected.shape, {input.dtype, input.data}, importance);
  const StoredTensor stored = {.name = "t", .shape = t.shape, .scheme = t.scheme};
  EXPECT_TRUE(std::ranges::equal(find_container("gguf")->pack(stored, t).front().data, c.at("data").data));
}

/// Blocks that ggml wrote: taken apart and put together again, the values they stand for, and where rounding is no
/// search the blocks from what they were made of.
void check_type(const std::string& folder, bool rounded = false) {
  const auto cases = golden_cases(folder, "data");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    const GgufType& type = *find_gguf_type(c.params["ggml_type"].get<uint32_t>());
    const std::map<std::string, ArraySpec, std::less<>> arrays = {
        {"t", {"t", DType::u8, c.at("dequantized").shape, &type.block}}};
    const Json none = Json::object();
    const CheckpointView view = {.arrays = arrays,
                                 .config = none,
                                 .quantization_metadata = none,
                                 .bytes = [&](const std::string&) { return c.at("data").data; },
                                 .where = c.name};
    // Bytes of TQ1_0 that no packing makes stand for the same codes as others; all other types come back as they were.
    const Container& gguf = *find_container("gguf");
    const bool canonical = type.block.name != "TQ1_0" || c.find("input") != nullptr;
    const QuantizedTensor read = canonical ? check_view(gguf, view) : gguf.unpack(gguf.list(view).front(), view);
    check_values(c, decode(read));
    if (rounded && c.find("input") != nullptr) check_rounding(c, read);
  }
  std::cout << "cases: " << cases.size() << '\n';
}

TEST(Golden, gguf_q8_0) { check_type("gguf_q8_0", true); }
TEST(Golden, gguf_q4_0) { check_type("gguf_q4_0", true); }
TEST(Golden, gguf_q4_1) { check_type("gguf_q4_1", true); }
TEST(Golden, gguf_q5_0) { check_type("gguf_q5_0", true); }
TEST(Golden, gguf_q5_1) { check_type("gguf_q5_1", true); }
TEST(Golden, gguf_q2_k) { check_type("gguf_q2_k"); }
TEST(Golden, gguf_q3_k) { check_type("gguf_q3_k"); }
TEST(Golden, gguf_q4_k) { check_type("gguf_q4_k"); }
TEST(Golden, gguf_q5_k) { check_type("gguf_q5_k"); }
TEST(Golden, gguf_q6_k) { check_type("gguf_q6_k"); }
TEST(Golden, gguf_iq4_nl) { check_type("gguf_iq4_nl"); }
TEST(Golden, gguf_iq4_xs) { check_type("gguf_iq4_xs"); }
TEST(Golden, gguf_iq2_xxs) { check_type("gguf_iq2_xxs"); }
TEST(Golden, gguf_iq2_xs) { check_type("gguf_iq2_xs"); }
TEST(Golden, gguf_iq2_s) { check_type("gguf_iq2_s"); }
TEST(Golden, gguf_iq3_xxs) { check_type("gguf_iq3_xxs"); }
TEST(Golden, gguf_iq3_s) { check_type("gguf_iq3_s"); }
TEST(Golden, gguf_iq1_s) { check_type("gguf_iq1_s"); }
TEST(Golden, gguf_iq1_m) { check_type("gguf_iq1_m"); }
TEST(Golden, gguf_mxfp4) { check_type("gguf_mxfp4", true); }
TEST(Golden, gguf_nvfp4) { check_type("gguf_nvfp4", true); }
TEST(Golden, gguf_tq1_0) { check_type("gguf_tq1_0", true); }
TEST(Golden, gguf_tq2_0) { check_type("gguf_tq2_0", true); }
TEST(Golden, gguf_q1_0) { check_type("gguf_q1_0"); }
TEST(Golden, gguf_q2_0) { check_type("gguf_q2_0"); }

// Every bit pattern of F16, as ggml reads it.
TEST(Golden, gguf_f16_bf16) {
  const auto cases = golden_cases("gguf_f16_bf16", "f32");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    std::vector<uint16_t> patterns(65536);
    std::iota(patterns.begin(), patterns.end(), uint16_t{0});
    std::vector<float> values(patterns.size());
    to_f32(DType::f16, std::as_bytes(std::span(patterns)), values);
    const std::vector<float> expected = c.floats("f32");
    ASSERT_EQ(expected.size(), values.size());
    size_t different = 0;  // bits, signs of zeros too; a NaN is a NaN
    for (size_t i = 0; i < values.size(); ++i)
      different += std::bit_cast<uint32_t>(values[i]) != std::bit_cast<uint32_t>(expected[i]) &&
                   !(std::isnan(values[i]) && std::isnan(expected[i]));
    EXPECT_EQ(different, 0u) << c.name;
  }
  std::cout << "cases: " << cases.size() << '\n';
}

TEST(GgufContainer, WhatDoesNotFitIsSaid) {
  const Container& gguf = *find_container("gguf");
  const Scheme q8_0 = {.element = &integer_element(8, true),
                       .scale = parameter(Grouping::along(32), plain(DType::f16))};
  EXPECT_EQ(gguf.fit(q8_0, {2, 64}).verdict, Verdict::exact);
  EXPECT_EQ(gguf.fit(q8_0, {2, 48}).verdict, Verdict::impossible);
  EXPECT_EQ(gguf.fit(q8_0, {}).verdict, Verdict::impossible);
  Scheme other = q8_0;
  other.scale = parameter(Grouping::along(64), plain(DType::f16));
  EXPECT_EQ(gguf.fit(other, {2, 64}).verdict, Verdict::impossible);
}

TEST(GgufRounding, AScaleBeyondFloat16IsRefused) {
  std::vector<float> values(32, 1.0f), importance(32, 1.0f);
  values[3] = 4e6f;
  const WeightView weight = {DType::f32, std::as_bytes(std::span<const float>(values))};
  for (const char* type : {"Q4_0", "Q4_1", "Q5_0"})
    for (const bool weighted : {false, true}) try {
        const Scheme scheme = find_block_codec(type)->scheme();
        const QuantizedTensor t =
            weighted ? round_to_gguf(scheme, {1, 32}, weight, importance) : round_to_gguf(scheme, {1, 32}, weight);
        ADD_FAILURE() << type;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "scale-overflow");
      }
}

}  // namespace
}  // namespace bitwright
