#include "algorithm/block_search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <iostream>
#include <limits>
#include <random>

#include "algorithm/codebook_blocks.hpp"
#include "base/error.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_types.hpp"
#include "tests/golden_cases.hpp"

namespace bitwright {
namespace {

double squared_error(std::span<const float> x, std::span<const float> y, std::span<const float> importance) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(y[i]);
    sum += (importance.empty() ? 1.0 : static_cast<double>(importance[i % importance.size()])) * d * d;
  }
  return sum;
}

// Each case of each type: the error, weighted where ggml had weights, is at most that of ggml's own blocks.
TEST(BlockSearch, IsNoWorseThanGgml) {
  size_t cases = 0;
  for (const BlockCodec& codec : all_block_codecs()) {
    const Scheme scheme = codec.scheme();
    if (!is_block_scheme(scheme)) continue;
    std::string folder = "gguf_";
    for (const char c : codec.type) folder += static_cast<char>(std::tolower(c));
    for (const test::GoldenCase& c : test::golden_cases(folder, "input")) {
      SCOPED_TRACE(folder + "/" + c.name);
      const StoredArray& input = c.at("input");
      const std::vector<float> importance = c.find("imatrix") == nullptr ? std::vector<float>() : c.floats("imatrix");
      const QuantizedTensor t = search_blocks(scheme, input.shape, {input.dtype, input.data}, importance);
      const std::vector<float> values = c.floats("input");
      const double theirs = squared_error(values, c.floats("dequantized"), importance);
      const double ours = squared_error(values, decode(t), importance);
      EXPECT_LE(ours, theirs) << ours / theirs;
      std::cout << folder << '/' << c.name << ' ' << ours / theirs << '\n';
      ++cases;
    }
  }
  if (cases == 0) GTEST_SKIP() << "no golden cases here";
  std::cout << "cases: " << cases << '\n';
}

TEST(BlockSearch, GivesTheSameBitsOnEveryLevel) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(7 * 512), importance(512);
  for (float& v : values) v = normal(random);
  for (float& v : importance) v = 1 + normal(random);
  std::fill_n(values.begin() + 600, 40, 0.0f);
  for (const BlockCodec& codec : all_block_codecs()) {
    if (!is_block_scheme(codec.scheme())) continue;
    const WeightView weight = {DType::f32, std::as_bytes(std::span(values))};
    const QuantizedTensor expected =
        search_blocks(codec.scheme(), {7, 512}, weight, importance, kernel_levels().back());
    for (const KernelLevel& level : kernel_levels()) {
      if (!level.usable()) continue;
      EXPECT_TRUE(search_blocks(codec.scheme(), {7, 512}, weight, importance, level) == expected)
          << codec.type << ' ' << level.name;
    }
  }
}

// Numbers no type reaches, numbers below all scales, no importance at all: codes that can be stored, finite values.
TEST(BlockSearch, HostileNumbersHaveCodes) {
  std::mt19937 random(3);
  std::vector<float> values(16 * 256), importance(256);
  for (size_t i = 8 * 256; i < values.size(); ++i) values[i] = static_cast<float>(random() % 5) - 2;  // many zeros
  for (size_t i = 0; i < 8 * 256; ++i) {
    const auto exponent = static_cast<int>(random() % 60);
    values[i] = std::ldexp(random() % 2 == 0 ? 1.5f : -1.25f, i < 512 ? 60 + exponent : -120 - exponent / 2);
  }
  std::fill_n(values.begin() + 1024, 1024, 0.0f);
  for (size_t i = 1536; i < 1792; ++i) values[i] = i % 2 == 0 ? 3.4e38f : 1e-40f;
  const std::vector<float> none(256), enormous(256, 3e38f);
  for (size_t i = 0; i < importance.size(); ++i)
    importance[i] = i % 3 == 0 ? 0.0f : std::ldexp(1.0f, static_cast<int>(i % 200) - 99);
  const WeightView weight = {DType::f32, std::as_bytes(std::span(values))};
  for (const BlockCodec& codec : all_block_codecs()) {
    if (!is_codebook_scheme(codec.scheme())) continue;
    for (const std::vector<float>& weights : {std::vector<float>(), importance, none, enormous}) {
      SCOPED_TRACE(codec.type);
      const QuantizedTensor t = search_blocks(codec.scheme(), {16, 256}, weight, weights);
      std::vector<uint8_t> block(find_gguf_type(codec.type)->block.bytes);
      QuantizedTensor back = block_tensor(t.scheme, t.shape);
      const TensorBlocks from(t, 16), to(back, 16);
      for (size_t i = 0; i < 16; ++i) {
        codec.pack(from.of(i), block.data());
        codec.unpack(block.data(), to.of(i));
      }
      EXPECT_TRUE(back == t);
      const std::vector<float> decoded = decode(t);
      EXPECT_TRUE(std::ranges::all_of(decoded, [](float x) { return std::isfinite(x); }));
      EXPECT_TRUE(std::ranges::all_of(std::span(decoded).subspan(1024, 512), [](float x) { return x == 0; }));
      EXPECT_GT(decoded[1536], 1e6f);
    }
  }
}

// Columns of no importance are near their values where that costs the others nothing.
TEST(BlockSearch, ColumnsOfNoImportanceAreNotForgotten) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(4 * 256), importance(256, 1.0f);
  for (float& v : values) v = normal(random);
  std::fill_n(importance.begin() + 64, 128, 0.0f);
  const WeightView weight = {DType::f32, std::as_bytes(std::span(values))};
  for (const BlockCodec& codec : all_block_codecs()) {
    if (!is_codebook_scheme(codec.scheme())) continue;
    const std::vector<float> decoded = decode(search_blocks(codec.scheme(), {4, 256}, weight, importance));
    EXPECT_LT(squared_error(values, decoded, {}), 0.2 * squared_error(values, std::vector<float>(values.size()), {}))
        << codec.type;
  }
}

TEST(BlockSearch, NoNumberIsNoNumber) {
  std::vector<float> values(256, 1.0f);
  values[77] = std::numeric_limits<float>::quiet_NaN();
  const WeightView weight = {DType::f32, std::as_bytes(std::span(values))};
  for (const char* type : {"Q4_K", "IQ2_XS"})
    EXPECT_THROW(search_blocks(find_block_codec(type)->scheme(), {1, 256}, weight), Error) << type;
}

// A group of one value above zero has one code, so nothing says what is scale and what is minimum.
TEST(BlockSearch, ConstantGroupsAreKept) {
  for (const char* type : {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"})
    for (const float value : {0.37f, -1.25f, 2.0f})
      for (const float noise : {0.0f, 0.005f})
        for (const bool weighted : {false, true}) {
          std::mt19937 engine(1);
          std::normal_distribution<float> normal(value, noise * std::fabs(value) + 1e-12f);
          std::vector<float> values(512), weights;
          std::ranges::generate(values, [&] { return noise == 0 ? value : normal(engine); });
          if (weighted) weights.resize(256, 3.0f);
          const QuantizedTensor t = search_blocks(find_block_codec(type)->scheme(), {2, 256},
                                                  {DType::f32, std::as_bytes(std::span<const float>(values))}, weights);
          const std::vector<float> decoded = decode(t);
          for (size_t i = 0; i < values.size(); ++i)
            ASSERT_NEAR(decoded[i], values[i], 0.05f * std::fabs(value)) << type << ' ' << value << ' ' << noise;
        }
}

}  // namespace
}  // namespace bitwright
