#include "bitwright/torch/ptq.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "scheme/affine.hpp"
#include "scheme/quantized_tensor.hpp"
#include "tests/toy_module.hpp"
#include "train/linear.hpp"
#include "train/quantized_module.hpp"

namespace bitwright {
namespace {

using namespace train;
using test::code_of;
using test::toy_input;
using test::toy_module;
using test::ToyModule;

std::vector<torch::Tensor> batches(int count = 4) {
  std::vector<torch::Tensor> all;
  for (int i = 0; i < count; ++i) all.push_back(toy_input(32, 100 + static_cast<uint64_t>(i)));
  return all;
}

uint64_t parameter_bytes(const torch::nn::Module& module) {
  uint64_t bytes = 0;
  for (const torch::Tensor& parameter : module.parameters()) bytes += parameter.nbytes();
  return bytes;
}

struct Result {
  QuantizationInfo info;
  OutputDifference difference;
  uint64_t parameters;
};
Result quantized(const PtqConfig& config) {
  ToyModule module = toy_module();
  const torch::NoGradGuard no_gradients;
  const torch::Tensor x = toy_input(), reference = module.forward(x);
  const QuantizationInfo info =
      config.type == "static" ? quantize_model_ptq(module, config, batches()) : quantize_model_ptq(module, config);
  return {info, compare_outputs(reference, module.forward(x)), parameter_bytes(module)};
}

TEST(SpecificationC, C1_Int8IsAboutFourTimesSmaller) {
  for (const char* type : {"static", "dynamic", "weight_only"}) {
    const Result result = quantized({.type = type});
    EXPECT_EQ(result.info.bits, 8);
    EXPECT_EQ(result.info.mode, type);
    EXPECT_EQ(result.info.affected.size(), 7U);
    EXPECT_TRUE(result.info.skipped.empty());  // the head is quantized, too
    EXPECT_LT(static_cast<double>(result.info.bytes), 0.27 * static_cast<double>(result.info.float_bytes));
    EXPECT_LT(static_cast<double>(result.parameters), 0.28 * static_cast<double>(parameter_bytes(toy_module())));
    EXPECT_LT(result.difference.relative, 0.02) << type;
    EXPECT_GT(result.difference.relative, 1e-4) << type;
    EXPECT_GT(result.difference.cosine, 0.999) << type;
    for (const LayerInfo& layer : result.info.affected) {
      EXPECT_GT(layer.relative_error, 1e-4);
      EXPECT_LT(layer.relative_error, 0.01);
    }
  }
}

TEST(SpecificationC, C1_Int4IsAboutEightTimesSmaller) {
  const Result result = quantized({.type = "weight_only", .bits = 4});
  EXPECT_EQ(result.info.bits, 4);
  EXPECT_LT(static_cast<double>(result.info.bytes), 0.14 * static_cast<double>(result.info.float_bytes));
  EXPECT_LT(result.difference.relative, 0.15);
  EXPECT_LT(quantized({.type = "dynamic", .bits = 4}).difference.relative, 0.15);
  EXPECT_LT(quantized({.type = "static", .bits = 4}).difference.relative, 0.15);
}

TEST(SpecificationC, C1_StaticRangesAreCalibratedAndFixed) {
  ToyModule module = toy_module();
  EXPECT_EQ(code_of([&] { quantize_model_ptq(module); }), "needs-calibration");
  EXPECT_EQ(code_of([&] { quantize_model_ptq(module, {}, std::vector<torch::Tensor>()); }), "needs-calibration");
  EXPECT_EQ(code_of([&] { quantize_model_ptq(module, {}, [] {}); }), "needs-calibration");  // no data reached it
  EXPECT_FALSE(is_model_quantized(module));
  EXPECT_EQ(behaviour_of(*module.lm_head), nullptr);
  quantize_model_ptq(module, {}, batches());
  const auto layer = behaviour_as<QuantizedLayer>(*module.layers->at<test::ToyBlock>(0).q_proj);
  ASSERT_NE(layer, nullptr);
  ASSERT_TRUE(layer->linear().input && !layer->linear().input->dynamic);
  float largest = 0;
  for (const torch::Tensor& batch : batches()) largest = std::max(largest, batch.abs().max().item<float>());
  EXPECT_FLOAT_EQ(decode(*layer->linear().input->scale).at(0), largest / 127);
  // What lies beyond is clipped: the scale stays.
  const torch::NoGradGuard no_gradients;
  const torch::Tensor x = torch::full({1, 128}, 2 * largest);
  EXPECT_TRUE(torch::allclose(layer->forward(x, {}), layer->forward(x * 4, {})));
}

TEST(SpecificationC, C1_DynamicRangesComeFromEachToken) {
  ToyModule module = toy_module();
  quantize_model_ptq(module, {.type = "dynamic"});
  const torch::NoGradGuard no_gradients;
  const torch::Tensor x = toy_input();
  const auto& layer = *module.layers->at<test::ToyBlock>(0).up_proj;
  const auto behaviour = behaviour_as<QuantizedLayer>(layer);
  // Eight times the input: eight times the output, as no scale is fixed.
  EXPECT_TRUE(torch::equal(behaviour->forward(x * 8, {}), behaviour->forward(x, {}) * 8));
  const torch::Tensor all = behaviour->forward(x, {}), one = behaviour->forward(x[1][3].unsqueeze(0), {});
  EXPECT_LT(compare_outputs(one[0], all[1][3]).relative, 1e-5);
}

TEST(SpecificationC, C1_ObserversDiffer) {
  std::vector<torch::Tensor> data = batches();
  data[1][0][0][0] = 1000;  // one outlier
  const auto scale = [&](const std::string& observer) {
    ToyModule module = toy_module();
    quantize_model_ptq(module, {.observer = observer, .averaging = 0.25}, data);
    const auto layer = behaviour_as<QuantizedLayer>(*module.layers->at<test::ToyBlock>(0).q_proj);
    return decode(*layer->linear().input->scale).at(0) * 127;
  };
  EXPECT_FLOAT_EQ(scale("minmax"), 1000);
  EXPECT_GT(scale("moving_average"), 100);
  EXPECT_LT(scale("moving_average"), 300);
  EXPECT_LT(scale("percentile"), 6);
  EXPECT_EQ(code_of([&] { scale("median"); }), "bad-value");
}

TEST(SpecificationC, C5_DequantizedModelsArePlain) {
  ToyModule module = toy_module();
  const torch::NoGradGuard no_gradients;
  quantize_model_ptq(module, {.type = "weight_only"});
  EXPECT_TRUE(is_model_quantized(module));
  EXPECT_EQ(code_of([&] { quantize_model_ptq(module, {.type = "weight_only"}); }), "already-quantized");
  const torch::Tensor x = toy_input(), before = module.forward(x);
  dequantize_model(module);
  EXPECT_FALSE(is_model_quantized(module));
  EXPECT_EQ(parameter_bytes(module), parameter_bytes(toy_module()));
  EXPECT_EQ(module.lm_head->weight.scalar_type(), torch::kFloat);
  EXPECT_TRUE(module.lm_head->weight.requires_grad());
  EXPECT_TRUE(torch::allclose(module.forward(x), before, 1e-5, 1e-5));
  const QuantizationInfo info = get_quantization_info(module);
  EXPECT_EQ(info.mode, "none");
  EXPECT_EQ(info.bits, 0);
  EXPECT_EQ(info.skipped.size(), 7U);
  EXPECT_EQ(info.bytes, info.float_bytes);
}

TEST(SpecificationC, C5_InfoNamesBitsModeLayersAndStatistics) {
  ToyModule module = toy_module();
  const QuantizationInfo info = quantize_model_ptq(
      module, {.type = "dynamic",
               .skip_modules = {"lm_head"},
               .layer_configs = {{"*.1.up_proj", {{"bits", 4}, {"granularity", "group"}, {"group_size", 32}}}}});
  EXPECT_EQ(info.bits, 8);
  EXPECT_EQ(info.mode, "dynamic");
  ASSERT_EQ(info.skipped.size(), 1U);
  EXPECT_EQ(info.skipped[0].path, "lm_head");
  ASSERT_EQ(info.affected.size(), 6U);
  EXPECT_EQ(info.affected[0].path, "layers.0.q_proj");
  EXPECT_EQ(info.affected[0].scheme, "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(info.affected[0].inputs, "dynamic int8 symmetric, per channel, float32 scales");
  EXPECT_EQ(info.affected[4].path, "layers.1.up_proj");
  EXPECT_EQ(info.affected[4].bits, 4);
  const OrderedJson json = to_json(info);
  EXPECT_EQ(json["quantized"], true);
  EXPECT_EQ(json["affected_layers"].size(), 6U);
  EXPECT_EQ(json["affected_layers"][4]["bits"], 4);
}

/// Codes of one layer, as PyTorch's own quantized tensor has them with the same scales and zero points.
void expect_torchs_codes(const PtqConfig& config, bool per_channel) {
  ToyModule module = toy_module();
  torch::nn::LinearImpl& linear = *module.layers->at<test::ToyBlock>(0).q_proj;
  const torch::Tensor weight = linear.weight.detach().clone();
  quantize_model_ptq(module, config);
  const QuantizedTensor ours = behaviour_as<QuantizedLayer>(linear)->weight()->unpacked();
  const std::vector<float> scales = decode(*ours.scale);
  const std::vector<float> zeros = ours.offset ? decode(*ours.offset) : std::vector<float>(scales.size(), 0);
  const torch::ScalarType type = ours.offset ? torch::kQUInt8 : torch::kQInt8;
  torch::Tensor theirs;
  if (per_channel)
    theirs = torch::quantize_per_channel(weight, torch::tensor(scales).to(torch::kDouble),
                                         torch::tensor(zeros).to(torch::kLong), 0, type);
  else
    theirs = torch::quantize_per_tensor(weight, scales[0], static_cast<int64_t>(zeros[0]), type);
  const torch::Tensor codes = theirs.int_repr().to(torch::kInt).flatten();
  int64_t differing = 0;
  for (size_t i = 0; i < ours.codes.size(); ++i) {
    const auto code = static_cast<int>(ours.codes[i]);
    const int own = ours.offset ? code : static_cast<int8_t>(code), other = codes[static_cast<int64_t>(i)].item<int>();
    ASSERT_LE(std::abs(own - other), 1);
    differing += own == other ? 0 : 1;
  }
  EXPECT_LE(differing, 2);  // of 16384: ties, where PyTorch multiplies by a reciprocal
  EXPECT_LE((theirs.dequantize() - behaviour_as<QuantizedLayer>(linear)->decoded()).abs().max().item<float>(),
            *std::ranges::max_element(scales) * 1.001F);
}

TEST(SpecificationC, C7_PerTensorPerChannelAndPerGroup) {
  expect_torchs_codes({.type = "weight_only", .granularity = "tensor"}, false);
  expect_torchs_codes({.type = "weight_only", .granularity = "tensor", .symmetric = false}, false);
  expect_torchs_codes({.type = "weight_only", .granularity = "channel"}, true);
  expect_torchs_codes({.type = "weight_only", .granularity = "channel", .symmetric = false}, true);
  const auto error = [](const std::string& granularity) {
    return quantized({.type = "weight_only", .bits = 4, .granularity = granularity}).difference.relative;
  };
  EXPECT_LT(error("channel"), error("tensor"));
  EXPECT_LT(error("group"), error("channel"));
}

TEST(SpecificationC, C7_Float8WeightsAndInputs) {
  for (const char* type : {"static", "dynamic", "weight_only"}) {
    const Result result = quantized({.type = type, .quant_type = "e4m3"});
    EXPECT_LT(result.difference.relative, 0.06) << type;
    EXPECT_EQ(result.info.bits, 8);
  }
}

TEST(Ptq, ConfigurationsAreChecked) {
  ToyModule module = toy_module();
  const auto code = [&](const PtqConfig& config) {
    return code_of([&] { quantize_model_ptq(module, config, batches(1)); });
  };
  EXPECT_EQ(code({.type = "sometimes"}), "bad-value");
  EXPECT_EQ(code({.bits = 9}), "bad-value");
  EXPECT_EQ(code({.granularity = "row"}), "bad-value");
  EXPECT_EQ(code({.format = "zip"}), "bad-value");
  EXPECT_EQ(code({.quant_type = "e4m3", .symmetric_inputs = false}), "bad-value");
  EXPECT_EQ(code({.skip_modules = {"layers", "lm_head"}}), "nothing-to-quantize");
  EXPECT_EQ(code({.observer = "percentile", .percentile = 30}), "bad-value");
  EXPECT_FALSE(is_model_quantized(module));
  module.layers->at<test::ToyBlock>(1).up_proj->weight.data()[3][4] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(code({.type = "weight_only"}), "not-finite");
  EXPECT_FALSE(is_model_quantized(module));  // as it was
}

TEST(Ptq, GradientsPassThroughQuantizedInputs) {
  ToyModule module = toy_module(), same = toy_module();
  quantize_model_ptq(module, {.type = "dynamic"});
  torch::Tensor x = toy_input(4).requires_grad_(), y = toy_input(4).requires_grad_();
  module.forward(x).square().sum().backward();
  same.forward(y).square().sum().backward();
  EXPECT_LT(compare_outputs(y.grad(), x.grad()).relative, 0.03);
}

TEST(Ptq, AModuleThatIsOneLayer) {
  torch::manual_seed(1);
  torch::nn::Linear linear(64, 64);
  EXPECT_EQ(quantize_model_ptq(*linear, {.type = "weight_only"}).affected.size(), 1U);
  EXPECT_TRUE(is_model_quantized(*linear));
}

}  // namespace
}  // namespace bitwright
