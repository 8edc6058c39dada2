#include "train/plan.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "scheme/quantized_tensor.hpp"
#include "tests/toy_module.hpp"
#include "train/linear.hpp"

namespace bitwright::train {
namespace {

using Net = test::ToyModule;

std::map<std::string, std::string> planned(const Net& net, const QuantizationConfig& config) {
  const ContainerRequest request = request_of(config);
  std::map<std::string, std::string> out;
  for (const LayerPlan& layer : plan_module(net, request.request, request.container).layers)
    out[layer.path] = layer.plan.scheme ? describe(*layer.plan.scheme) : layer.plan.reason;
  return out;
}

TEST(ModulePlan, EveryMethodHasItsLibrarysSchemes) {
  const Net net;
  const auto q_proj = [&](const std::string& method, int64_t bits = 0) {
    return planned(net, {.method = method, .bits = bits}).at("layers.1.q_proj");
  };
  EXPECT_EQ(q_proj("bnb_nf4"), "nf4, blocks of 64, double-quantized (dynamic8) scales");
  EXPECT_EQ(q_proj("bnb_int8"), "int8 symmetric, per channel, float32 scales");
  EXPECT_EQ(q_proj("hqq"), "int4 asymmetric, blocks of 64, float32 scales");
  EXPECT_EQ(q_proj("hqq", 8), "int8 asymmetric, blocks of 64, float32 scales");
  EXPECT_EQ(q_proj("mlx_int4"), "int4 asymmetric, group 64, float32 scales");
  EXPECT_EQ(q_proj("mlx_int8"), "int8 asymmetric, group 64, float32 scales");
  EXPECT_EQ(q_proj("quanto_int2"), "int2 asymmetric, blocks of 128, float32 scales");
  EXPECT_EQ(q_proj("quanto_int4"), "int4 asymmetric, blocks of 128, float32 scales");
  EXPECT_EQ(q_proj("quanto_int8"), "int8 symmetric, per channel, float32 scales");
  EXPECT_EQ(q_proj("none"), "method none");
}

TEST(ModulePlan, RulesSkipsAndShapes) {
  const Net net;
  const OrderedJson rules = {{"*.1.up_proj", {{"bits", 8}, {"group_size", 32}}}, {"q_proj", {{"method", "none"}}}};
  const auto all = planned(net, {.method = "mlx_int4", .layer_configs = rules});
  EXPECT_EQ(all.at("lm_head"), "skip_modules");
  EXPECT_EQ(all.at("layers.0.q_proj"), "method none");
  EXPECT_EQ(all.at("layers.1.up_proj"), "int8 asymmetric, group 32, float32 scales");
  EXPECT_EQ(all.at("layers.0.odd_proj"), "rows of [128, 96] are no multiple of 64");
  EXPECT_NE(planned(net, {.method = "hqq", .skip_modules = {}}).at("lm_head"), "skip_modules");
  EXPECT_THROW(request_of({.method = "mlx_int4", .layer_configs = {{"q_proj", {{"method", "hqq"}}}}}), Error);
  EXPECT_THROW(request_of({.method = "mlx_int4", .layer_configs = {{"q_proj", {{"bitz", 8}}}}}), Error);
  EXPECT_THROW(request_of({.method = "mlx_int9"}), Error);
  EXPECT_THROW(planned(net, {.method = "hqq", .skip_modules = {"layers", "lm_head"}}), Error);
}

TEST(ModulePlan, ConfigurationsAsJson) {
  const QuantizationConfig config = {.method = "hqq",
                                     .bits = 3,
                                     .group_size = 32,
                                     .compute_dtype = "float32",
                                     .double_quant = false,
                                     .skip_modules = {"a", "b"},
                                     .layer_configs = {{"x", {{"bits", 8}}}}};
  EXPECT_EQ(quantization_config_from_json(to_json(config)), config);
  EXPECT_EQ(quantization_config_from_json(OrderedJson::object()), QuantizationConfig());
  EXPECT_THROW(quantization_config_from_json({{"metod", "hqq"}}), Error);
  EXPECT_THROW(quantization_config_from_json({{"method", "hqq"}, {"group_size", "64"}}), Error);
}

TEST(ModulePlan, WeightsBecomeWhatTheSchemeSays) {
  torch::manual_seed(1);
  const Net net;
  for (const torch::ScalarType type : {torch::kFloat, torch::kBFloat16}) {
    const ContainerRequest request = request_of({.method = "mlx_int8"});
    const ModulePlan plan = plan_module(net, request.request, request.container);
    const torch::Tensor weight = plan.layers[0].layer->weight.to(type);
    const QuantizedTensor quantized = quantize_weight(plan.layers[0].plan, weight);
    const std::vector<float> values = decode(quantized);
    const torch::Tensor back = torch::from_blob(const_cast<float*>(values.data()), weight.sizes());
    EXPECT_LT((back - weight.to(torch::kFloat)).abs().max().item<float>(), 1e-3F);
  }
}

}  // namespace
}  // namespace bitwright::train
