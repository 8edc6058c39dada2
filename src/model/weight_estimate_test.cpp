#include "model/weight_estimate.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "model/model.hpp"
#include "model/open_model.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

std::vector<StoredTensor> outline(const Checkpoint& checkpoint) {
  std::vector<StoredTensor> tensors;
  for (const TensorEntry& entry : checkpoint.tensors())
    tensors.push_back({.name = entry.name, .shape = entry.shape, .scheme = entry.scheme, .value_dtype = entry.dtype});
  return tensors;
}

void expect_near(const std::filesystem::path& path) {
  const Checkpoint checkpoint = open_model(path);
  const Model model(checkpoint);
  const auto held = static_cast<double>(model.weight_bytes());
  const auto estimate = static_cast<double>(estimated_weight_bytes(checkpoint.config(), outline(checkpoint)));
  EXPECT_NEAR(estimate / held, 1, 0.05) << estimate << " of " << held;
}

std::string recipe_name(const testing::TestParamInfo<const char*>& info) {
  return "Recipe" + std::to_string(info.index);
}

class WeightEstimate : public testing::TestWithParam<const char*> {};

/// The bundled model, as it is quantized.
TEST_P(WeightEstimate, IsWhatTheModelHolds) {
  const test::TemporaryDirectory directory;
  OrderedJson config = parse_config_value(GetParam(), "test");
  check_config(config, "test");
  std::vector<Warning> warnings;
  quantize(open_model(test::example_model()), read_request(config),
           {.output = {.output = directory / "out"}, .verify = false, .container = find_container("native")}, warnings);
  expect_near(directory / "out");
}
INSTANTIATE_TEST_SUITE_P(
    Recipes, WeightEstimate,
    testing::Values("quantization: {method: int8}", "quantization: {method: int4}",
                    "quantization: {method: int4, scheme: {group_size: 32, symmetric: true}}",
                    "quantization: {method: int4, scheme: {group_size: 128, scale_dtype: bfloat16}}",
                    "quantization: {method: int3}", "quantization: {method: int2, scheme: {group_size: 16}}",
                    "quantization: {method: int4, scheme: {nested_scales: true}}",
                    "quantization: {scheme: {bits: 6, group_size: 32}}", "quantization: {method: nf4}",
                    "quantization: {method: nf4, scheme: {nested_scales: true}}",
                    "quantization: {method: int8, layer_configs: {embed_tokens: {method: int8}}}",
                    "quantization: {method: int8, scheme: {granularity: tensor}}"),
    recipe_name);

TEST(WeightEstimateOfPlain, IsWhatTheModelHolds) { expect_near(test::example_model()); }

/// Every model and quantized checkpoint that is at hand and runs.
TEST(ModelsWeightEstimate, IsWhatTheModelHolds) {
  const auto models = test::shared_dir() / "data/models";
  if (!std::filesystem::is_directory(models)) GTEST_SKIP() << "no models here";
  size_t cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(models)) {
    if (!std::filesystem::exists(entry.path() / "hf" / "config.json")) continue;
    SCOPED_TRACE(entry.path());
    expect_near(entry.path() / "hf");
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

}  // namespace
}  // namespace bitwright
