#include "bitwright/torch/qat.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <sstream>

#include "base/error.hpp"
#include "train/causal_lm.hpp"
#include "train/fake_quantized_linear.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright {
namespace {

using namespace train;
using torch::Tensor;

struct Net : torch::nn::Module {
  Net() {
    torch::manual_seed(5);
    first = register_module("first", torch::nn::Linear(48, 24));
    second = register_module("second", torch::nn::Linear(torch::nn::LinearOptions(24, 10).bias(false)));
  }
  Tensor forward(const Tensor& x) { return second(torch::tanh(first(x))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
};

QatConfig config_of(OrderedJson scheme) {
  QatConfig config;
  config.quantization = {{"scheme", std::move(scheme)}};
  return config;
}

struct Named {
  std::string name;
  QatConfig config;
};
std::vector<Named> configurations() {
  std::vector<Named> all = {{"int8", config_of({{"bits", 8}})},
                            {"int4 channel", config_of({{"bits", 4}, {"symmetric", true}, {"granularity", "channel"}})},
                            {"int4 tensor", config_of({{"bits", 4}, {"symmetric", true}, {"granularity", "tensor"}})},
                            {"int4 zero points", config_of({{"bits", 4}, {"group_size", 32}})},
                            {"int3", config_of({{"bits", 3}, {"group_size", 16}})},
                            {"int2", config_of({{"bits", 2}, {"group_size", 32}})},
                            {"nf4", config_of({{"quant_type", "nf4"}})},
                            {"nf4 nested", config_of({{"quant_type", "nf4"}, {"nested_scales", true}})},
                            {"fp8", config_of({{"quant_type", "e4m3"}, {"granularity", "channel"}})}};
  const auto with = [&](const std::string& name, const auto& change) {
    all.push_back({name, config_of({{"bits", 8}})});
    change(all.back().config);
  };
  with("computed", [](QatConfig& c) { c.scales = "computed"; });
  with("as in the paper", [](QatConfig& c) { c.initial_scales = "lsq"; });
  with("dynamic", [](QatConfig& c) { c.activations = "dynamic"; });
  with("dynamic e4m3", [](QatConfig& c) {
    c.activations = "dynamic";
    c.activation_type = "e4m3";
  });
  for (const char* ranges : {"minmax", "moving_average", "percentile", "learned"})
    for (const bool symmetric : {true, false})
      with(fmt::format("static {} {}", ranges, symmetric), [&](QatConfig& c) {
        c.activations = "static";
        c.activation_ranges = ranges;
        c.symmetric_activations = symmetric;
      });
  with("static e4m3", [](QatConfig& c) {
    c.activations = "static";
    c.activation_type = "e4m3";
  });
  return all;
}

Tensor inputs() {
  torch::manual_seed(11);
  return torch::randn({64, 48});
}

/// Mean squared distance from what a net in floats gives.
double train(Net& net, int steps, double lr = 0.05) {
  const Tensor x = inputs(), target = Net().forward(x).detach();
  torch::optim::SGD optimizer(net.parameters(), lr);
  double loss = 0;
  for (int i = 0; i < steps; ++i) {
    optimizer.zero_grad();
    const Tensor error = torch::mse_loss(net.forward(x), target);
    error.backward();
    optimizer.step();
    loss = error.item<double>();
  }
  return loss;
}

TEST(Qat, ConvertedModelGivesWhatTheLearningOneGives) {
  for (const Named& c : configurations()) {
    SCOPED_TRACE(c.name);
    Net net;
    const QatLayers layers = prepare_model_for_qat(net, c.config);
    EXPECT_EQ(layers.quantized, (std::vector<std::string>{"first", "second"}));
    EXPECT_TRUE(is_qat_model(net));
    train(net, 3);
    net.eval();
    const Tensor x = inputs(), expected = net.forward(x).detach();
    EXPECT_FALSE(torch::allclose(expected, Net().forward(x), 0, 1e-6));
    EXPECT_EQ(convert_qat_model(net), 2);
    EXPECT_FALSE(is_qat_model(net));
    EXPECT_LE((net.forward(x) - expected).abs().max().item<float>(), 1e-4);
    EXPECT_EQ(net.parameters().size(), 3u);  // codes and a bias: nothing that learned is left
    EXPECT_EQ(net.buffers().size(), 0u);
    const auto layer = behaviour_as<QuantizedLinearBehaviour>(*net.second);
    ASSERT_NE(layer, nullptr);
    EXPECT_EQ(layer->linear().input.has_value(), c.config.activations != "auto");
  }
}

TEST(Qat, LearnsThroughTheQuantization) {
  for (const auto& scheme : {OrderedJson{{"bits", 4}, {"symmetric", true}, {"granularity", "channel"}},
                             OrderedJson{{"bits", 2}, {"group_size", 16}}}) {
    Net net;
    prepare_model_for_qat(net, config_of(scheme));
    const double before = train(net, 1, 0);
    EXPECT_LT(train(net, 150, 0.3), 0.8 * before) << scheme;
  }
}

TEST(Qat, WhatIsLearnedAndObservedIsInCheckpoints) {
  QatConfig config = config_of({{"bits", 4}, {"group_size", 16}});
  config.activations = "static";
  const auto prepared = [&](const std::string& ranges) {
    config.activation_ranges = ranges;
    auto net = std::make_shared<Net>();
    prepare_model_for_qat(*net, config);
    return net;
  };
  for (const char* ranges : {"learned", "moving_average"}) {
    const auto net = prepared(ranges), other = prepared(ranges);
    train(*net, 4);
    net->eval();
    other->eval();
    const auto names = net->named_parameters();
    EXPECT_TRUE(names.contains("first.weight"));
    EXPECT_TRUE(names.contains("first.fake_quantize.weight_scale"));
    EXPECT_TRUE(names.contains("first.fake_quantize.weight_zero"));
    EXPECT_EQ(names.contains("first.fake_quantize.input_scale"), std::string(ranges) == "learned");
    EXPECT_EQ(net->named_buffers().contains("first.fake_quantize.input_range"), std::string(ranges) != "learned");
    std::stringstream file;
    torch::serialize::OutputArchive out;
    net->save(out);
    out.save_to(file);
    torch::serialize::InputArchive in;
    in.load_from(file);
    other->load(in);
    EXPECT_TRUE(torch::equal(other->forward(inputs()), net->forward(inputs())));
  }
}

TEST(Qat, ScalesLearnAndAreStoredAsTheyWereLearned) {
  Net net;
  prepare_model_for_qat(net, config_of({{"bits", 4}, {"symmetric", true}, {"granularity", "channel"}}));
  const Tensor scale = net.named_parameters()["first.fake_quantize.weight_scale"];
  const Tensor before = scale.detach().clone();
  train(net, 20);
  EXPECT_GT((scale - before).abs().max().item<float>(), 0);
  const Tensor learned = stored_scale(scale, DType::f16).detach().clone();
  convert_qat_model(net);
  const auto layer = behaviour_as<QuantizedLinearBehaviour>(*net.first);
  const Tensor weight = layer->decoded();
  const Tensor codes = weight / learned.unsqueeze(1);
  EXPECT_LE((codes - codes.round()).abs().max().item<float>(), 1e-4);
  EXPECT_LE(codes.abs().max().item<float>(), 8.01f);
}

/// The gradients of inputs, and of what is learned of them, by the equations: straight through within the range, LSQ's
/// round(x / s) - x / s for the scale there and the last code beyond (Esser et al. 2020, eq. 3), times 1 / sqrt(N Qp).
TEST(Qat, GradientsOfLearnedAndObservedInputs) {
  for (const char* ranges : {"learned", "moving_average"})
    for (const char* type : {"int8", "int4"})
      for (const bool symmetric : {true, false}) {
        SCOPED_TRACE(fmt::format("{} {} symmetric {}", ranges, type, symmetric));
        QatConfig config = config_of({{"bits", 8}});
        config.activations = "static";
        config.activation_type = type;
        config.activation_ranges = ranges;
        config.symmetric_activations = symmetric;
        config.averaging = 1e-3;
        Net net;
        prepare_model_for_qat(net, config);
        net.first(inputs());
        const auto layer = behaviour_as<FakeQuantizedLinear>(*net.first);
        Tensor x = (inputs() * 20).requires_grad_();  // much lies beyond what was seen, or learned
        const Tensor slope = torch::randn({64, 24});
        (net.first(x) * slope).sum().backward();
        const ActivationScheme input = *layer->linear().input;
        const double s = static_cast<double>(decode(*input.scale).at(0));
        const double z = input.offset ? static_cast<double>(decode(*input.offset).at(0)) : 0;
        const IntegerGrid grid = *integer_grid(input.scheme);

        const Tensor arriving = slope.matmul(layer->fake_weight().detach()).to(torch::kDouble);
        const Tensor scaled = x.detach().to(torch::kDouble) / s, code = scaled.round() + z;
        const Tensor inside = (code >= grid.lowest).logical_and(code <= grid.highest);
        EXPECT_GT(inside.sum().item<int64_t>(), 100);
        EXPECT_GT(inside.logical_not().sum().item<int64_t>(), 100);
        EXPECT_TRUE(torch::allclose(x.grad().to(torch::kDouble), arriving * inside, 1e-4, 1e-5));
        const auto names = net.named_parameters();
        EXPECT_EQ(names.contains("first.fake_quantize.input_scale"), std::string(ranges) == "learned");
        if (std::string(ranges) != "learned") continue;
        const double factor = lsq_factor(grid, {1, 48});
        const Tensor last = code.clamp(grid.lowest, grid.highest) - z;
        const Tensor by_scale = arriving * torch::where(inside, scaled.round() - scaled, last);
        const double bound = 1e-4 * factor * by_scale.abs().sum().item<double>();
        EXPECT_NEAR(names["first.fake_quantize.input_scale"].grad().item<double>(),
                    factor * by_scale.sum().item<double>(), bound);
        if (symmetric) continue;
        const Tensor by_zero = arriving * inside.logical_not() * -s;
        EXPECT_NEAR(names["first.fake_quantize.input_zero"].grad().item<double>(),
                    factor * by_zero.sum().item<double>(), bound);
      }
}

TEST(Qat, RangesAreObservedInTrainingModeAlone) {
  QatConfig config;
  config.activations = "static";
  config.activation_ranges = "minmax";
  Net net;
  prepare_model_for_qat(net, config);
  net.eval();
  EXPECT_THROW(net.forward(inputs()), Error);
  EXPECT_THROW(convert_qat_model(net), Error);
  EXPECT_TRUE(is_qat_model(net));
  net.train();
  const Tensor y = net.forward(inputs());
  net.eval();
  net.forward(inputs() * 100);
  EXPECT_TRUE(torch::equal(net.forward(inputs()), y));
}

TEST(Qat, RefusesWhatIsWrongAndChangesNothing) {
  Net net;
  const auto refused = [&](const QatConfig& config, std::string_view words) {
    try {
      prepare_model_for_qat(net, config);
      ADD_FAILURE() << words;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
    EXPECT_EQ(net.named_parameters().size(), 3u);
    EXPECT_FALSE(is_qat_model(net));
  };
  const auto changed = [](const auto& change) {
    QatConfig config;
    change(config);
    return config;
  };
  refused(changed([](QatConfig& c) { c.scales = "clever"; }), "valid: auto, learned, computed");
  refused(changed([](QatConfig& c) { c.format = "nowhere"; }), "nowhere");
  refused(changed([](QatConfig& c) { c.quantization = {{"method", "int5"}}; }), "int5");
  refused(changed([](QatConfig& c) { c.quantization = {{"method", "none"}}; }), "nothing to quantize");
  refused(changed([](QatConfig& c) {
            c.quantization = {{"method", "nf4"}};
            c.scales = "learned";
          }),
          "cannot be learned");
  refused(changed([](QatConfig& c) {
            c.activations = "static";
            c.averaging = 2;
          }),
          "averaging");
  refused(changed([](QatConfig& c) {
            c.activations = "static";
            c.activation_type = "e4m3";
            c.symmetric_activations = false;
          }),
          "no zero point");
  EXPECT_THROW(convert_qat_model(net), Error);
  prepare_model_for_qat(net);
  EXPECT_THROW(prepare_model_for_qat(net), Error);
}

TEST(Qat, SkippedLayersStayAsTheyAre) {
  QatConfig config;
  config.quantization = {{"method", "int8"}, {"skip_modules", {"second"}}};
  Net net;
  const QatLayers layers = prepare_model_for_qat(net, config);
  EXPECT_EQ(layers.kept, std::vector<std::string>{"second"});
  EXPECT_EQ(behaviour_of(*net.second), nullptr);
  EXPECT_NE(behaviour_of(*net.first), nullptr);
}

TEST(Qat, BundledModelConverts) {
  CausalLm model{Checkpoint("examples/tinystories-4m")};
  QatConfig config = config_of({{"bits", 4}, {"symmetric", true}, {"granularity", "channel"}});
  config.activations = "dynamic";
  EXPECT_EQ(prepare_model_for_qat(model, config).quantized.size(), 28u);
  const Tensor tokens = torch::arange(64).reshape({2, 32}) * 5 + 20;
  model.loss(tokens, tokens).backward();
  {
    const torch::NoGradGuard no_gradient;
    for (const Tensor& p : model.parameters())
      if (p.grad().defined()) p.sub_(1e-2 * p.grad());
  }
  model.eval();
  const torch::NoGradGuard no_gradient;
  const Tensor expected = model.forward(tokens);
  EXPECT_EQ(convert_qat_model(model), 28);
  EXPECT_LE((model.forward(tokens) - expected).abs().max().item<float>(), 1e-4);
}

}  // namespace
}  // namespace bitwright
