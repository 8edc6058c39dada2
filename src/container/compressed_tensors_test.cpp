#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <random>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "container/compressed_tensors_config.hpp"
#include "container/compressed_tensors_rounding.hpp"
#include "tests/golden_cases.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& ct() { return *find_container("compressed-tensors"); }

Json config_with(const Json& weights, const std::string& format) {
  return {{"quantization_config",
           {{"quant_method", "compressed-tensors"},
            {"format", format},
            {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}}}};
}

/// What the library would call the layout of a case.
std::string format_of(const GoldenCase& c) {
  if (c.find("weight_packed") == nullptr) {
    if (c.at("weight_scale").dtype == DType::u8) return "mxfp8-quantized";
    return c.params.value("type", "int") == "int" ? "int-quantized" : "float-quantized";
  }
  if (c.find("weight_global_scale") != nullptr) return "nvfp4-pack-quantized";
  return c.at("weight_packed").dtype == DType::u8 ? "mxfp4-pack-quantized" : "pack-quantized";
}

std::vector<std::string> stored_arrays(const GoldenCase& c) {
  std::vector<std::string> arrays;
  for (const StoredArray& array : c.file.arrays())
    if (array.name.starts_with("weight") || array.name.starts_with("input_")) arrays.push_back(array.name);
  return arrays;
}

size_t differences(std::span<const std::byte> a, std::span<const std::byte> b) {
  EXPECT_EQ(a.size(), b.size());
  size_t count = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) count += a[i] != b[i];
  return count;
}

/// What the library decodes where it guesses blocks from the number of scales (decompress without arguments).
void check_guessed_blocks(const GoldenCase& c, QuantizedTensor t) {
  const Shape scales = c.at("weight_scale").shape;
  Grouping guessed = t.scheme.scale->grouping;
  guessed.block_rows = t.shape[0] / scales[0];
  guessed.block_columns = t.shape[1] / scales[1];
  t.scheme.scale = parameter(guessed, *t.scheme.scale->scheme);
  check_values(c, decode(t));
}

void check_products(const GoldenCase& c, const std::vector<float>& weight) {
  if (c.find("x") == nullptr) return;
  const std::vector<float> x = c.floats("x");
  const auto columns = static_cast<size_t>(c.at("x").shape.back()), rows = weight.size() / columns;
  std::vector<double> expected(x.size() / columns * rows);
  ASSERT_EQ(c.at("y").dtype, DType::f64);
  std::memcpy(expected.data(), c.at("y").data.data(), expected.size() * sizeof(double));
  for (size_t i = 0; i < expected.size(); ++i) {
    double sum = 0, terms = 0;
    for (size_t k = 0; k < columns; ++k) {
      const double term =
          static_cast<double>(x[i / rows * columns + k]) * static_cast<double>(weight[i % rows * columns + k]);
      sum += term;
      terms += std::fabs(term);
    }
    EXPECT_NEAR(sum, expected[i], static_cast<double>(columns) * 0x1p-52 * terms);
  }
}

/// Reads, decodes, writes again, and quantizes its input as the library did: everything bit for bit.
void check_case(const GoldenCase& c) {
  SCOPED_TRACE(c.name);
  const Json config = config_with(c.params, format_of(c));
  const QuantizedTensor t = check_container(ct(), c, stored_arrays(c), "", config);
  const std::vector<float> values = decode(t);
  if (const StoredArray* const explicit_values = c.find("dequantized_explicit_args")) {
    std::vector<float> expected(values.size());
    to_f32(explicit_values->dtype, explicit_values->data, expected);
    EXPECT_TRUE(values == expected);
    check_guessed_blocks(c, t);
  } else {
    check_values(c, values);
  }
  check_products(c, values);
  if (const StoredArray* const zeros = c.find("zero_point_unpacked")) {
    std::vector<std::byte> stored(zeros->data.begin(), zeros->data.end());
    const int half = 1 << (t.scheme.element->bits - 1);
    for (std::byte& zero : stored) zero = static_cast<std::byte>(std::to_integer<int>(zero) + half);
    EXPECT_EQ(differences(stored, t.offset->codes), 0u) << "zero points";
  }
  if (c.params.value("actorder", Json()).is_string()) return;  // whose groups came from calibration
  const StoredArray& input = c.at("input");
  const QuantizedTensor encoded = ct().encode(t.scheme, input.shape, {input.dtype, input.data});
  EXPECT_EQ(differences(encoded.codes, t.codes), 0u) << "codes";
  EXPECT_EQ(differences(encoded.scale->codes, t.scale->codes), 0u) << "scales";
  EXPECT_TRUE(encoded == t);
}

void check_folder(const std::string& folder) {
  const auto cases = golden_cases(folder);
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) check_case(c);
  const auto models = golden_models(folder);
  for (const auto& model : models) check_model(model);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

TEST(Golden, ct_pack_quantized) { check_folder("ct_pack_quantized"); }
TEST(Golden, ct_int_quantized) { check_folder("ct_int_quantized"); }
TEST(Golden, ct_float_quantized) { check_folder("ct_float_quantized"); }
TEST(Golden, ct_nvfp4) { check_folder("ct_nvfp4"); }
TEST(Golden, ct_mxfp4) { check_folder("ct_mxfp4"); }

}  // namespace
}  // namespace bitwright
