#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "algorithm/algorithm.hpp"
#include "container/container.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_rounding.hpp"
#include "kernels/decode.hpp"

namespace bitwright {
namespace {

constexpr size_t kRows = 8, kColumns = 512;

std::vector<float> normal_numbers() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(kRows * kColumns);
  for (float& v : values) v = normal(random);
  return values;
}

QuantizedTensor quantized(const char* type, const char* algorithm, const std::vector<float>& values,
                          const std::vector<float>& importance) {
  const Container& gguf = *find_container("gguf");
  return find_algorithm(algorithm)->quantize(
      find_block_codec(type)->scheme(), {kRows, kColumns}, {DType::f32, std::as_bytes(std::span(values))},
      {.owner = gguf.encode, .importance = importance, .weighted_owner = gguf.encode_weighted});
}

/// Of the columns from `first` on.
double error(const QuantizedTensor& t, const std::vector<float>& values, size_t first, size_t count) {
  const std::vector<float> decoded = decode(t);
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i)
    if (i % kColumns >= first && i % kColumns < first + count)
      sum += std::pow(static_cast<double>(values[i]) - static_cast<double>(decoded[i]), 2);
  return sum;
}

// Columns that count more are rounded better, whatever the type does to weights.
TEST(ImatrixAlgorithm, LosesLessWhereItCounts) {
  const std::vector<float> values = normal_numbers();
  std::vector<float> importance(kColumns, 1.0f);
  for (size_t j = 0; j < kColumns; j += 4) importance[j] = 100;
  const auto weighted = [&](const QuantizedTensor& t) {
    const std::vector<float> decoded = decode(t);
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i)
      sum += static_cast<double>(importance[i % kColumns]) *
             std::pow(static_cast<double>(values[i]) - static_cast<double>(decoded[i]), 2);
    return sum;
  };
  for (const char* type : {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1"})
    EXPECT_LT(weighted(quantized(type, "imatrix", values, importance)), weighted(quantized(type, "rtn", values, {})))
        << type;
}

// A sum of squares of 0 says that the text did not reach an input, not that nothing ever will.
TEST(ImatrixAlgorithm, WhatWasNotReachedIsKeptAllTheSame) {
  const std::vector<float> values = normal_numbers();
  for (const float others : {0.0f, 1.0f, 1e-25f, 1e25f}) {
    std::vector<float> importance(kColumns, others);
    std::fill_n(importance.begin(), 256, 0.0f);
    for (const char* type : {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}) {
      const QuantizedTensor plain = quantized(type, "rtn", values, {}),
                            weighted = quantized(type, "imatrix", values, importance);
      // With importance more is tried, which may be better.
      EXPECT_LT(error(weighted, values, 0, 256), 1.02 * error(plain, values, 0, 256)) << type << ' ' << others;
      EXPECT_LT(error(weighted, values, 256, 256), 1.02 * error(plain, values, 256, 256)) << type << ' ' << others;
    }
  }
}

TEST(ImatrixAlgorithm, RoundsAsGgmlWhereGgmlRounds) {
  const std::vector<float> values = normal_numbers(), importance(values.begin(), values.begin() + kColumns);
  std::vector<float> squares;
  for (const float v : importance) squares.push_back(v * v);
  const WeightView weight = {DType::f32, std::as_bytes(std::span(values))};
  for (const char* type : {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"}) {
    const QuantizedTensor t = quantized(type, "imatrix", values, squares);
    EXPECT_TRUE(t == round_to_gguf(t.scheme, t.shape, weight, squares)) << type;
  }
}

}  // namespace
}  // namespace bitwright
