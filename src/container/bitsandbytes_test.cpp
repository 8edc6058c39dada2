#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iostream>

#include "tests/golden_cases.hpp"

namespace bitwright {
namespace {

using namespace test;

/// Bitsandbytes' default (torch) backend is the definition of our encoder: same codes, same absmax. Not compared: the
/// mean of absmax, whose order of summation the library leaves open, and what is quantized around it.
void check_encoder(const GoldenCase& c, const std::string& type) {
  const bool nested = c.params.value("compress_statistics", false);
  const Scheme absmax = plain(DType::f32);
  const Scheme scheme = {.element = find_element(type),
                         .scale = parameter(Grouping::flat(c.params["blocksize"].get<int64_t>()), absmax)};
  const std::vector<float> input = c.floats("input");
  const QuantizedTensor t = encode(scheme, c.at("input").shape, input);
  const std::span<const std::byte> packed = c.at("weight").data;
  size_t different = 0;
  for (size_t i = 0; i < t.codes.size(); ++i)
    different += t.codes[i] != (i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & std::byte{15});
  EXPECT_EQ(different, 0u) << "codes";
  EXPECT_TRUE(nested || std::ranges::equal(t.scale->codes, c.at("weight.absmax").data)) << "absmax";
}

void check_folder(const std::string& type) {
  const auto cases = golden_cases("bnb_" + type, "weight.quant_state.bitsandbytes__" + type);
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    std::vector<std::string> arrays;
    for (const StoredArray& array : c.file.arrays())
      if (array.name.starts_with("weight")) arrays.push_back(array.name);
    check_values(c, decode(check_container(*find_container("bitsandbytes"), c, arrays, "", Json::object())));
    if (c.backend.starts_with("pure torch")) check_encoder(c, type);
  }
  std::cout << "cases: " << cases.size() << '\n';
}

TEST(Golden, bnb_nf4) { check_folder("nf4"); }
TEST(Golden, bnb_fp4) { check_folder("fp4"); }

// The table of nested scales and its codes. "default" cases come from the torch backend, whose encoder is exact; the
// one that nests uses the mean of absmax, whose order of summation the library leaves open.
TEST(Golden, bnb_8bit_blockwise) {
  const auto maps = golden_cases("bnb_8bit_blockwise", "dynamic_signed");
  if (maps.empty()) GTEST_SKIP() << "no golden cases here";
  const ElementType& dynamic8 = *find_element("dynamic8");
  const std::vector<float> map = maps[0].floats("dynamic_signed");
  for (uint32_t code = 0; code < 256; ++code) EXPECT_EQ(dynamic8.decode(dynamic8, code), map[code]) << code;
  size_t count = 0;
  for (const GoldenCase& c : golden_cases("bnb_8bit_blockwise", "q")) {
    SCOPED_TRACE(c.name);
    if (!c.name.starts_with("default") || c.params["nested"]) continue;
    const Scheme scheme = {.element = &dynamic8,
                           .scale = parameter(Grouping::flat(c.params["blocksize"].get<int64_t>()), plain(DType::f32))};
    const QuantizedTensor t = encode(scheme, c.at("input").shape, c.floats("input"));
    EXPECT_TRUE(std::ranges::equal(t.codes, c.at("q").data));
    EXPECT_TRUE(std::ranges::equal(t.scale->codes, c.at("absmax").data));
    EXPECT_EQ(decode(t), c.floats("dequantized"));
    ++count;
  }
  std::cout << "cases: " << count << '\n';
}

}  // namespace
}  // namespace bitwright
