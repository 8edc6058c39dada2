#include "algorithm/block_search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <iostream>
#include <limits>
#include <random>

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

TEST(BlockSearch, NoNumberIsNoNumber) {
  std::vector<float> values(256, 1.0f);
  values[77] = std::numeric_limits<float>::quiet_NaN();
  const WeightView weight = {DType::f32, std::as_bytes(std::span(values))};
  EXPECT_THROW(search_blocks(find_block_codec("Q4_K")->scheme(), {1, 256}, weight), Error);
}

}  // namespace
}  // namespace bitwright
