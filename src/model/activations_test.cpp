#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "kernels/matmul.hpp"
#include "model/feed_forward.hpp"
#include "quantize/quantize.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

Scheme eight_bits(const ElementType& element, const Grouping& grouping) {
  return {.element = &element, .scale = parameter(grouping, plain(DType::f32))};
}

TEST(ModelActivations, ALinearLayerMultipliesWhatTheCodesStandFor) {
  constexpr size_t kTokens = 5, kColumns = 48, kRows = 20;
  const std::vector<float> x = random_values(kTokens * kColumns, 1), w = random_values(kRows * kColumns, 2);
  const Scheme input = eight_bits(integer_element(8, true), Grouping::channel());
  const Scheme output = eight_bits(float_element(DType::f8_e4m3), Grouping::channel());
  Linear linear = {.weight = pack_matrix(DType::f32, std::as_bytes(std::span(w)), kRows, kColumns),
                   .bias = random_values(kRows, 3)};
  linear.input.emplace(ActivationScheme{.scheme = input});
  std::vector<float> y(kTokens * kRows), expected(y.size());
  apply(linear, x.data(), kTokens, y.data());
  multiply(decode(encode(input, {kTokens, kColumns}, x)).data(), kTokens, linear.weight, expected.data());
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += linear.bias[i % kRows];
  EXPECT_EQ(y, expected);
  linear.output.emplace(ActivationScheme{.scheme = output});
  apply(linear, x.data(), kTokens, y.data());
  EXPECT_EQ(y, decode(encode(output, {kTokens, kRows}, expected)));
}

std::vector<float> logits_of(const std::filesystem::path& path) {
  const Checkpoint checkpoint(path);
  const Model model(checkpoint);
  KvCache cache(model.config(), 16);
  const std::vector<int32_t> tokens = {1, 17, 300, 5, 9, 1000, 42, 7};
  return model.forward(tokens, cache);
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i] - b[i]), 2);
    norm += std::pow(static_cast<double>(a[i]), 2);
  }
  return std::sqrt(difference / norm);
}

/// A model quantized to W8A8 has its inputs quantized when it runs, in each container that says so, and the same ones.
TEST(ModelActivations, AModelWhoseInputsAreQuantizedRunsThatWay) {
  const test::TemporaryDirectory dir;
  const Checkpoint source(test::example_model());
  std::vector<Warning> warnings;
  const auto logits = [&](const std::string& format, bool weight_only) {
    QuantizationRequest request;
    request.settings = {.method = "int8",
                        .granularity = "channel",
                        .scale_dtype = "float32",
                        .bits = 8,
                        .symmetric = true,
                        .weight_only = weight_only};
    const std::filesystem::path out = dir / (format + (weight_only ? "-w8" : "-w8a8"));
    quantize(source, request, {.output = {.output = out}, .verify = false, .container = find_container(format)},
             warnings);
    const Checkpoint written(out);
    const TensorEntry* const entry = written.find("model.layers.0.mlp.up_proj.weight");
    EXPECT_EQ(entry->linear.input.has_value(), !weight_only) << format;
    return logits_of(out);
  };
  const std::vector<float> floats = logits_of(test::example_model());
  for (const std::string format : {"native", "compressed-tensors"}) {
    SCOPED_TRACE(format);
    const std::vector<float> w8 = logits(format, true), w8a8 = logits(format, false);
    EXPECT_LT(distance(floats, w8), 0.02);
    EXPECT_GT(distance(w8, w8a8), 1e-3);
    EXPECT_LT(distance(w8, w8a8), 0.05);
  }
}

}  // namespace
}  // namespace bitwright
