#include "train/training_mode.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "bitwright/torch/qat.hpp"
#include "bitwright/torch/trainer.hpp"
#include "tests/support.hpp"
#include "train/training_checkpoint.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

constexpr int64_t kVocabulary = 19;

struct Net : torch::nn::Module {
  Net() {
    embedding = register_module("embedding", torch::nn::Embedding(kVocabulary, 32));
    hidden = register_module("hidden", torch::nn::Linear(32, 64));
    dropout = register_module("dropout", torch::nn::Dropout(0.2));
    head = register_module("head", torch::nn::Linear(64, kVocabulary));
  }
  Tensor forward(const Tensor& tokens) { return head(dropout(torch::relu(hidden(embedding(tokens))))); }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear hidden{nullptr}, head{nullptr};
  torch::nn::Dropout dropout{nullptr};
};

/// A way of training that has a state of its own.
struct Way {
  const char* name;
  std::shared_ptr<QuantizedFinetuning> (*prepare)(Net& net);
};

std::shared_ptr<QuantizedFinetuning> qat(Net& net, const char* activations, const char* ranges) {
  prepare_model_for_qat(net, {.quantization = {{"method", "int4"}, {"scheme", {{"granularity", "channel"}}}},
                              .activations = activations,
                              .activation_ranges = ranges});
  return nullptr;
}

const Way kWays[] = {
    {"QatObservedRanges", [](Net& net) { return qat(net, "static", "moving_average"); }},
    {"QatLearnedRanges", [](Net& net) { return qat(net, "static", "learned"); }},
    {"QatDynamic", [](Net& net) { return qat(net, "dynamic", "moving_average"); }},
    {"QuantizedFinetuning", [](Net& net) { return enable_quantized_finetuning(net, {.bits = 8}); }},
    {"ErrorCompensated",
     [](Net& net) { return enable_quantized_finetuning(net, {.requantization = Requantization::error_compensated}); }},
};

struct TrainingModes : testing::TestWithParam<Way> {
  /// Steps until `steps`, from the newest checkpoint where there is one. Returns the losses of this part.
  static std::vector<double> run(const std::filesystem::path& output, int64_t steps, uint64_t seed) {
    torch::manual_seed(seed);
    const auto net = std::make_shared<Net>();
    TrainingConfig config;
    config.output = output;
    config.max_steps = 10;
    config.schedule = "constant";
    config.checkpoint_every = 5;
    config.batch_size = 2;
    config.gradient_accumulation_steps = 2;
    config.learning_rate = 1e-2;
    const auto finetuning = GetParam().prepare(*net);
    Trainer trainer({.module = net, .logits = [net](const Tensor& ids) { return net->forward(ids); }}, config,
                    finetuning);
    trainer.resume();
    Trainer::Texts texts = {.sequence_length = 6, .vocabulary = kVocabulary};
    for (int64_t i = 0; i < 300; ++i) texts.training.push_back(static_cast<int32_t>(i * i % kVocabulary));
    texts.validation.assign(texts.training.begin(), texts.training.begin() + 50);
    std::vector<double> losses;
    trainer.after_step([&](const StepResult& step) {
      losses.push_back(step.loss);
      if (step.step == steps) throw std::runtime_error("the machine goes down");
    });
    try {
      trainer.train(texts);
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "the machine goes down");
    }
    return losses;
  }
};

// SPECIFICATION C3, C6: what is observed, learned, or quantized goes on bit for bit.
TEST_P(TrainingModes, ResumeBitForBit) {
  const test::TemporaryDirectory directory;
  const std::vector<double> straight = run(directory / "straight", 99, 1);
  run(directory / "parts", 7, 1);  // the checkpoint of step 5 is what is left
  const std::vector<double> rest = run(directory / "parts", 99, 2);
  ASSERT_EQ(straight.size(), 10u);
  EXPECT_EQ(rest, std::vector<double>(straight.begin() + 5, straight.end()));
  const TrainingState one = read_training_state(checkpoint_path(directory / "straight", 10));
  const TrainingState other = read_training_state(checkpoint_path(directory / "parts", 10));
  ASSERT_EQ(one.model.size(), other.model.size());
  ASSERT_EQ(one.optimizer.size(), other.optimizer.size());
  for (const auto& [name, tensor] : one.model) EXPECT_TRUE(torch::equal(tensor, other.model.at(name))) << name;
  for (const auto& [name, tensor] : one.optimizer) EXPECT_TRUE(torch::equal(tensor, other.optimizer.at(name))) << name;
}

INSTANTIATE_TEST_SUITE_P(All, TrainingModes, testing::ValuesIn(kWays),
                         [](const auto& item) { return std::string(item.param.name); });

/// AdamW's first step is its learning rate long, or nothing.
TEST(TrainingMode, LearnedScalesHaveARateOfTheirOwn) {
  for (const char* optimizer : {"adamw", "adamw8bit"})
    for (const double share : {0.0, 0.125, 1.0}) {
      SCOPED_TRACE(fmt::format("{} {}", optimizer, share));
      torch::manual_seed(1);
      const auto net = std::make_shared<Net>();
      qat(*net, "static", "learned");
      TrainingConfig config;
      config.optimizer = optimizer;
      config.schedule = "constant";
      config.learning_rate = 1e-3;
      config.weight_decay = 0;
      config.qat.scale_lr = share;
      const Tensor tokens = torch::arange(14).reshape({2, 7});
      net->forward(tokens.narrow(1, 0, 6));  // where input scales begin
      std::map<std::string, Tensor> before;
      for (const auto& item : net->named_parameters()) before[item.key()] = item.value().detach().clone();
      Trainer trainer({.module = net, .logits = [net](const Tensor& ids) { return net->forward(ids); }}, config);
      trainer.training_step(tokens);
      int scales = 0;
      for (const auto& item : net->named_parameters()) {
        const bool is_scale = item.key().find("fake_quantize.") != std::string::npos;
        const double step = (item.value() - before[item.key()]).abs().max().item<double>();
        const double rate = is_scale ? share * 1e-3 : 1e-3;
        EXPECT_LE(step, 1.02 * rate) << item.key();
        // Where nothing is clipped, zero points have no gradient.
        const bool may_rest = item.key().ends_with("zero");
        EXPECT_GE(step, may_rest ? 0 : 0.98 * rate) << item.key();
        scales += is_scale ? 1 : 0;
      }
      EXPECT_EQ(scales, 6);  // of two layers: scales and zero points of weights, scales of inputs
    }
}

// SPECIFICATION C4: the fields choose the mode, and without them there is none.
TEST(SpecificationC, C4_FieldsChooseTheMode) {
  TrainingConfig config;
  EXPECT_EQ(training_mode(config).name, "plain");
  config.quantization_mode = "qat";
  EXPECT_EQ(training_mode(config).name, "qat");
  config.quantization_mode = "ptq";
  EXPECT_EQ(training_mode(config).name, "ptq");
  config.quantization_mode = "none";
  config.enable_quantized_finetuning = true;
  EXPECT_EQ(training_mode(config).name, "quantized_finetuning");
  config.enable_quantized_finetuning = false;
  config.lora.r = 8;
  EXPECT_EQ(training_mode(config).name, "lora");
}

}  // namespace
}  // namespace bitwright::train
