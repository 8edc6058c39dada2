// Scenarios of SPECIFICATION C and D through what users have: bitwright/torch.hpp, and configurations as `bitwright
// train` runs them.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.hpp"
#include "bitwright/torch.hpp"
#include "checkpoint/checkpoint.hpp"
#include "model/model.hpp"
#include "tests/support.hpp"
#include "tests/toy_module.hpp"
#include "train/causal_lm.hpp"
#include "train/export.hpp"
#include "train/training_checkpoint.hpp"
#include "train/training_run.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;
using test::TemporaryDirectory;
using test::toy_input;
using test::toy_module;
using test::ToyModule;
using torch::Tensor;

template <class Action>
Error error_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error;
  }
  ADD_FAILURE() << "no error";
  return Error({});
}

/// A small model and a short text in a directory of their own, trained by configurations.
class Runs {
 public:
  Runs() {
    test::write_file(folder / "text",
                     test::read_file(test::example_model() / "tinystories_valid.txt").substr(0, 12000));
  }

  /// `yaml` besides what all runs have. Returns what the command does.
  OrderedJson run(const std::string& yaml, const std::vector<std::string>& set = {}, bool resume = false,
                  bool force = false) {
    test::write_file(folder / "config.yaml",
                     fmt::format(R"(
architecture: {{architectures: [LlamaForCausalLM], model_type: llama, hidden_size: 64, intermediate_size: 128,
  num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 4096, max_position_embeddings: 64,
  rms_norm_eps: 1.0e-5, hidden_act: silu, tie_word_embeddings: true}}
tokenizer: {}
data: {{text: {}, sequence_length: 16}}
max_steps: 2
batch_size: 2
learning_rate: 1.0e-3
schedule: constant
eval_windows: 2
output: {}
{}
)",
                                 test::example_model().string(), (folder / "text").string(), output().string(), yaml));
    warnings.clear();
    return train::run_training({.config = folder / "config.yaml", .set = set, .resume = resume, .force = force},
                               warnings);
  }
  fs::path output() const { return folder / "out"; }
  Checkpoint model() const { return Checkpoint(output() / "model"); }
  std::vector<double> losses() const {
    std::vector<double> all;
    std::istringstream file(test::read_file(output() / "loss.jsonl"));
    for (std::string line; std::getline(file, line);) all.push_back(Json::parse(line)["loss"]);
    return all;
  }

  TemporaryDirectory folder;
  std::vector<Warning> warnings;
};

// ---- C2: quantization-aware training ----

TEST(SpecificationC, C2_ForwardIsFakeQuantizedAndGradientsAreInFullPrecision) {
  torch::manual_seed(3);
  torch::nn::Linear layer(64, 32);
  const Tensor weight = layer->weight.detach().clone(), x = torch::randn({8, 64}), dy = torch::randn({8, 32});
  EXPECT_FALSE(is_qat_model(*layer));
  prepare_model_for_qat(*layer, {.quantization = {{"method", "int8"}, {"scheme", {{"granularity", "channel"}}}}});
  EXPECT_TRUE(is_qat_model(*layer));
  EXPECT_FALSE(is_model_quantized(*layer));  // its weights are floats still
  EXPECT_EQ(get_quantization_info(*layer).mode, "qat");
  const auto parameters = layer->named_parameters();
  const Tensor scales = parameters["fake_quantize.weight_scale"].detach().to(torch::kHalf).to(torch::kFloat);
  const Tensor theirs =
      torch::fake_quantize_per_channel_affine(weight, scales, torch::zeros({32}, torch::kInt), 0, -128, 127);
  EXPECT_FALSE(torch::equal(theirs, weight));
  const Tensor y = layer->forward(x);
  EXPECT_TRUE(torch::allclose(y, torch::linear(x, theirs, layer->bias), 1e-5, 1e-5));
  y.backward(dy);
  const Tensor gradient = parameters["weight"].grad();
  EXPECT_EQ(gradient.scalar_type(), torch::kFloat);
  const Tensor codes = (weight / scales.unsqueeze(1)).round(), inside = codes.ge(-128).logical_and(codes.le(127));
  EXPECT_TRUE(torch::allclose(gradient, torch::mm(dy.t(), x) * inside, 1e-4, 1e-4));  // straight through
}

TEST(SpecificationC, C2_ObserversParametersArePartOfTraining) {
  for (const char* ranges : {"moving_average", "learned"}) {
    ToyModule module = toy_module();
    prepare_model_for_qat(module, {.activations = "static", .activation_ranges = ranges});
    const auto state = [&] {
      const bool learned = std::string(ranges) == "learned";
      const auto named = learned ? module.named_parameters() : module.named_buffers();
      return named[learned ? "lm_head.fake_quantize.input_scale" : "lm_head.fake_quantize.input_range"].clone();
    };
    const Tensor first = state();
    torch::optim::SGD optimizer(module.parameters(), 1e-2);
    module.forward(toy_input()).square().mean().backward();
    optimizer.step();
    const Tensor second = state();
    module.zero_grad();
    module.forward(toy_input() * 3).square().mean().backward();
    optimizer.step();
    EXPECT_FALSE(torch::equal(first, second)) << ranges;
    EXPECT_FALSE(torch::equal(second, state())) << ranges;
  }
}

TEST(SpecificationC, C2_LearnsRobustnessAndConvertsWithMinimalLoss) {
  const Tensor x = toy_input(), target = toy_module().forward(x).detach();
  const auto loss = [&](ToyModule& module) { return torch::mse_loss(module.forward(x), target); };
  ToyModule rounded = toy_module(), module = toy_module();
  const OrderedJson int2 = {{"scheme", {{"bits", 2}, {"group_size", 32}}}};
  quantize_model_ptq(rounded, {.type = "weight_only", .bits = 2, .group_size = 32});
  prepare_model_for_qat(module, {.quantization = int2});
  torch::optim::Adam adam(module.parameters(), 1e-3);
  for (int i = 0; i < 60; ++i) {
    adam.zero_grad();
    loss(module).backward();
    adam.step();
  }
  module.eval();
  const double learning = loss(module).item<double>();
  convert_qat_model(module);
  EXPECT_FALSE(is_qat_model(module));
  EXPECT_TRUE(is_model_quantized(module));
  EXPECT_EQ(get_quantization_info(module).bits, 2);
  EXPECT_NEAR(loss(module).item<double>(), learning, 1e-4 * learning);
  EXPECT_LT(learning, 0.7 * loss(rounded).item<double>());
}

// ---- C3: a quantized model goes on learning ----

struct LanguageModel : torch::nn::Module {
  LanguageModel() {
    torch::manual_seed(1);
    embedding = register_module("embedding", torch::nn::Embedding(23, 64));
    hidden = register_module("hidden", torch::nn::Linear(64, 96));
    out = register_module("out", torch::nn::Linear(torch::nn::LinearOptions(96, 23).bias(false)));
  }
  Tensor forward(const Tensor& tokens) { return out(torch::relu(hidden(embedding(tokens)))); }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear hidden{nullptr}, out{nullptr};
};

TrainableModel trainable(const std::shared_ptr<LanguageModel>& model) {
  return {.module = model, .logits = [model](const Tensor& tokens) { return model->forward(tokens); }};
}

TEST(SpecificationC, C3_TrainingStepsKeepWeightsQuantized) {
  const TemporaryDirectory folder;
  const auto model = std::make_shared<LanguageModel>();
  const auto tuning = enable_quantized_finetuning(*model);
  TrainingConfig config;
  config.output = folder / "out";
  config.max_steps = 8;
  config.learning_rate = 1e-2;
  config.schedule = "constant";
  config.enable_quantized_finetuning = true;
  Trainer trainer(trainable(model), config, tuning);
  const Tensor tokens = torch::arange(4 * 9).reshape({4, 9}).square().remainder(23);
  double first = 0, last = 0;
  for (int step = 0; step < 8; ++step) {
    const auto before = tuning->state();
    last = trainer.training_step(tokens).loss;
    if (step == 0) first = last;
    const auto after = tuning->state();
    for (const char* name : {"hidden.codes", "out.codes"}) EXPECT_FALSE(before.at(name).equal(after.at(name))) << name;
    for (const char* name : {"hidden.weight", "out.weight"})
      EXPECT_EQ(model->named_parameters()[name].scalar_type(), torch::kUInt8) << name;
    const QuantizationInfo info = get_quantization_info(*model);
    EXPECT_EQ(info.bits, 8);
    EXPECT_EQ(info.affected.size(), 2U);
    EXPECT_LE(static_cast<double>(info.bytes), 0.27 * static_cast<double>(info.float_bytes));
  }
  EXPECT_LT(last, first - 0.3);
  trainer.save_checkpoint(folder / "checkpoint");
  const auto saved = tuning->state();
  const double next = trainer.training_step(tokens).loss;
  const auto other = std::make_shared<LanguageModel>();
  const auto resumed = enable_quantized_finetuning(*other);
  Trainer again(trainable(other), config, resumed);
  again.load_checkpoint(folder / "checkpoint");
  EXPECT_EQ(again.step(), 8);
  for (const auto& [name, tensor] : resumed->state()) EXPECT_TRUE(tensor.equal(saved.at(name))) << name;
  EXPECT_EQ(again.training_step(tokens).loss, next);
}

/// Codes and scales are all that is written: a quarter of the floats, and the runtime computes the same with them.
TEST(SpecificationC, C3_ExportedModelStaysSmallWithEqualLogits) {
  const TemporaryDirectory folder;
  const OrderedJson config = {{"architectures", {"LlamaForCausalLM"}},
                              {"model_type", "llama"},
                              {"hidden_size", 128},
                              {"intermediate_size", 512},
                              {"num_hidden_layers", 2},
                              {"num_attention_heads", 4},
                              {"num_key_value_heads", 4},
                              {"vocab_size", 24},
                              {"max_position_embeddings", 64},
                              {"rms_norm_eps", 1e-5},
                              {"hidden_act", "silu"},
                              {"tie_word_embeddings", true}};
  const auto model = std::make_shared<train::CausalLm>(Json(config), train::CausalLmOptions{.seed = 3});
  const train::ExportSource source = {.config = config};
  train::export_model(train::exported_tensors(*model), source, {.output = {.output = folder / "floats"}});
  const auto tuning = enable_quantized_finetuning(*model);
  const Tensor tokens = torch::arange(48).reshape({3, 16}).square().remainder(23);
  const Tensor untrained = model->forward(tokens).detach();
  for (int step = 0; step < 3; ++step) {
    tuning->set_learning_rate(1e-3);
    model->loss(tokens.narrow(1, 0, 15), tokens.narrow(1, 1, 15)).backward();
    tuning->step();
  }
  train::export_model(train::exported_tensors(*model), source,
                      {.output = {.output = folder / "int8"}, .container = find_container("native")});
  const auto size = [&](const char* name) {
    return static_cast<double>(fs::file_size(folder / name / "model.safetensors"));
  };
  EXPECT_LE(size("int8"), 0.27 * size("floats"));
  const torch::NoGradGuard no_gradients;
  const Tensor logits = model->forward(tokens);
  EXPECT_GT((logits - untrained).abs().max().item<float>(), 1e-3);
  const Checkpoint written(folder / "int8");
  written.verify_digests();
  train::CausalLm again{written};
  EXPECT_LE((again.forward(tokens) - logits).abs().max().item<float>(), 1e-4);
  const Model runtime(written);
  KvCache cache(runtime.config(), 16);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < 16; ++i) ids.push_back(tokens[1][i].item<int32_t>());
  const Tensor native = torch::tensor(runtime.forward(ids, cache)).reshape({16, 24});
  EXPECT_LE((native - logits[1]).abs().max().item<float>(), 1e-3);
}

// ---- C4: the fields of a configuration ----

/// Nothing but these four, with these values and defaults.
TEST(SpecificationC, C4_FieldsAndDefaultsAreExactlyThese) {
  struct Field {
    const char* name;
    OrderedJson value;  ///< the default
    std::vector<OrderedJson> valid, refused;
  };
  const std::vector<Field> fields = {
      {"quantization_mode", "none", {nullptr, "none", "ptq", "qat"}, {"", "QAT", "awq", 8, true}},
      {"quantization_bits", 8, {8, 4}, {0, 2, 5, 16, -8, "8", 8.0, true}},
      {"quantization_type", "static", {"static", "dynamic"}, {"", "weight_only", 1}},
      {"enable_quantized_finetuning", false, {true, false}, {1, "yes", "true"}},
  };
  const OrderedJson defaults = TrainingConfig().to_json();
  EXPECT_EQ(TrainingConfig::from_json(OrderedJson::object()).to_json(), defaults);
  for (const Field& field : fields) {
    EXPECT_EQ(defaults.at(field.name), field.value) << field.name;
    for (const OrderedJson& value : field.valid) {
      const OrderedJson read = TrainingConfig::from_json({{field.name, value}}).to_json().at(field.name);
      EXPECT_EQ(read, value.is_null() ? field.value : value) << field.name;
    }
    for (const OrderedJson& value : field.refused) {
      const Error error = error_of([&] { TrainingConfig::from_json({{field.name, value}}); });
      EXPECT_EQ(error.status(), ExitStatus::usage);
      EXPECT_NE(std::string(error.what()).find(field.name), std::string::npos) << error.what();
    }
  }
  const TrainingConfig c;
  EXPECT_EQ(c.quantization_mode, "none");
  EXPECT_EQ(c.quantization_bits, 8);
  EXPECT_EQ(c.quantization_type, "static");
  EXPECT_FALSE(c.enable_quantized_finetuning);
}

/// What the fields make of a model, from the configuration to what is exported.
struct FieldsCase {
  const char* name;
  const char* yaml;
  const char* mode;
  size_t quantized;  ///< layers of what is exported; it has seven
  uint32_t bits;     ///< of most of them
  const char* inputs = "";
};
void PrintTo(const FieldsCase& c, std::ostream* out) { *out << c.name; }
constexpr const char* kInt4 = "quantization: {method: int4, layer_configs: {down_proj: {bits: 8}}}\n";
const FieldsCase kFields[] = {
    {"Nothing", "", "plain", 0, 0},
    {"Null", "quantization_mode: null\n", "plain", 0, 0},
    {"PtqStatic", "quantization_mode: ptq\n", "ptq", 7, 8, "static"},
    {"PtqDynamic4", "quantization_mode: ptq\nquantization_bits: 4\nquantization_type: dynamic\n", "ptq", 7, 4,
     "dynamic"},
    {"QatStatic4", "quantization_mode: qat\nquantization_bits: 4\n", "qat", 7, 4, "static"},
    {"QatDynamic", "quantization_mode: qat\nquantization_type: dynamic\n", "qat", 7, 8, "dynamic"},
    {"Finetuning", "enable_quantized_finetuning: true\n", "quantized_finetuning", 7, 8},
    {"Finetuning4", "enable_quantized_finetuning: true\nquantization_bits: 4\n", "quantized_finetuning", 7, 4},
    // The section wins over the fields, rules of layers included.
    {"PtqSection", kInt4, "ptq", 7, 4},
    {"QatSection", kInt4, "qat", 7, 4},
    {"FinetuningSection", kInt4, "quantized_finetuning", 7, 4},
    {"QloraSection", kInt4, "lora", 7, 4},
    {"LoftqSection", kInt4, "lora", 7, 4},
};

struct SpecificationC4 : testing::TestWithParam<FieldsCase> {
  static std::string yaml() {
    const std::string name = GetParam().name;
    const std::string own = GetParam().yaml;
    if (!name.ends_with("Section")) return own;
    if (name.starts_with("Ptq")) return own + "quantization_mode: ptq\n";
    if (name.starts_with("Qat")) return own + "quantization_mode: qat\n";
    if (name.starts_with("Finetuning")) return own + "enable_quantized_finetuning: true\n";
    return own + fmt::format("lora: {{r: 4, merge: requantize, init: {}}}\n",
                             name.starts_with("Loftq") ? "loftq" : "default");
  }
};

TEST_P(SpecificationC4, FieldsDoWhatTheySay) {
  const FieldsCase& c = GetParam();
  Runs runs;
  const OrderedJson result = runs.run(yaml());
  EXPECT_EQ(result["mode"], c.mode);
  EXPECT_EQ(result["steps"], 2);
  EXPECT_TRUE(std::isfinite(result["val_loss"].get<double>()));
  const Checkpoint model = runs.model();
  size_t quantized = 0;
  for (const TensorEntry& entry : model.tensors()) {
    if (!entry.quantized()) continue;
    ++quantized;
    const bool ruled =
        yaml().find("down_proj") != std::string::npos && entry.name.find("down_proj") != std::string::npos;
    EXPECT_EQ(entry.scheme.element->bits, ruled ? 8U : c.bits) << entry.name;
    const std::string inputs = !entry.linear.input ? "" : entry.linear.input->dynamic ? "dynamic" : "static";
    EXPECT_EQ(inputs, c.inputs) << entry.name;
  }
  EXPECT_EQ(quantized, c.quantized);
  // It goes on from its checkpoint, exactly as without the pause.
  runs.run(yaml(), {"max_steps=3"}, true);
  Runs straight;
  straight.run(yaml(), {"max_steps=3"});
  EXPECT_EQ(runs.losses(), straight.losses());
  EXPECT_EQ(test::read_file(runs.output() / "model" / "model.safetensors"),
            test::read_file(straight.output() / "model" / "model.safetensors"));
}

INSTANTIATE_TEST_SUITE_P(All, SpecificationC4, testing::ValuesIn(kFields),
                         [](const auto& item) { return std::string(item.param.name); });

// ---- C5 ----

TEST(SpecificationC, C5_EachKindOfModelSaysWhatItIsAndBecomesPlain) {
  const Tensor x = toy_input();
  const torch::NoGradGuard no_gradients;
  ToyModule learning = toy_module();
  prepare_model_for_qat(learning);
  EXPECT_TRUE(is_qat_model(learning));
  EXPECT_EQ(get_quantization_info(learning).mode, "qat");
  dequantize_model(learning);
  EXPECT_FALSE(is_qat_model(learning));
  EXPECT_EQ(learning.named_parameters().size(), toy_module().named_parameters().size());
  EXPECT_TRUE(torch::equal(learning.forward(x), toy_module().forward(x)));  // the floats that learn

  ToyModule adapted = toy_module();
  prepare_qlora(adapted, {.r = 4, .target_modules = {"q_proj"}});
  EXPECT_TRUE(is_model_quantized(adapted));
  const QuantizationInfo info = get_quantization_info(adapted);
  EXPECT_EQ(info.bits, 4);
  EXPECT_EQ(info.affected.front().path, "layers.0.q_proj");  // below its adapter, too
  // What an adapter has learned is not to be lost.
  const auto before = adapted.named_parameters().keys();
  const Error error = error_of([&] { dequantize_model(adapted); });
  EXPECT_EQ(error.code(), "not-a-weight");
  EXPECT_NE(std::string(error.what()).find("layers.0.q_proj: the layer has an adapter"), std::string::npos);
  EXPECT_TRUE(is_model_quantized(adapted));
  EXPECT_EQ(adapted.named_parameters().keys(), before);
}

// ---- C6 ----

TEST(SpecificationC, C6_CheckpointsOfRunsHaveAllThatBelongsToThem) {
  Runs runs;
  const OrderedJson result = runs.run("enable_quantized_finetuning: true\n");
  const fs::path checkpoint = result["checkpoint"].get<std::string>();
  const OrderedJson metadata = OrderedJson::parse(test::read_file(checkpoint / "quantization_metadata.json"));
  EXPECT_EQ(metadata["format_version"], "1.0");
  EXPECT_EQ(metadata["method"], "quantized_finetuning");
  EXPECT_EQ(metadata["layers"].size(), 7U);
  const train::TrainingState state = train::read_training_state(checkpoint);
  EXPECT_EQ(state.facts["step"], 2);
  EXPECT_EQ(state.facts["config_hash"], result["config_hash"]);
  EXPECT_EQ(state.facts["config"]["enable_quantized_finetuning"], true);
  for (const char* name : {"tokenizer.json", "model_config.json", "quantization_metadata.json"})
    EXPECT_TRUE(state.facts["files"].contains(name)) << name;
  EXPECT_TRUE(state.optimizer.contains("random.cpu"));
  EXPECT_TRUE(state.model.contains("model.embed_tokens.weight"));
  EXPECT_TRUE(state.optimizer.contains("m.model.embed_tokens.weight"));
  // Of what is not quantized there is no such file.
  Runs plain;
  EXPECT_FALSE(fs::exists(fs::path(plain.run("")["checkpoint"].get<std::string>()) / "quantization_metadata.json"));
}

// ---- D1 ----

TEST(SpecificationD, D1_FieldsAndDefaultsAreExactlyThese) {
  const OrderedJson expected = {{"method", "none"},
                                {"group_size", 64},
                                {"compute_dtype", "bfloat16"},
                                {"storage_dtype", "uint8"},
                                {"double_quant", true},
                                {"quant_type", "nf4"},
                                {"skip_modules", {"lm_head"}},
                                {"layer_configs", OrderedJson::object()},
                                {"backend_options", OrderedJson::object()}};
  EXPECT_EQ(to_json(QuantizationConfig()), expected);  // bits: the method's own
  EXPECT_EQ(to_json(QuantizationConfig{.bits = 4})["bits"], 4);
  EXPECT_EQ(quantization_config_from_json(OrderedJson::object()), QuantizationConfig());
  for (const OrderedJson& bad :
       {OrderedJson{{"metod", "hqq"}}, OrderedJson{{"method", "awq"}}, OrderedJson{{"group_size", "64"}},
        OrderedJson{{"double_quant", 1}}, OrderedJson{{"skip_modules", 3}}})
    EXPECT_EQ(error_of([&] { quantization_config_from_json(bad); }).status(), ExitStatus::usage) << bad;
}

// ---- D7 ----

TEST(SpecificationD, D7_QloraTrainsSavesAndMerges) {
  const TemporaryDirectory folder;
  const Tensor x = toy_input(), target = toy_module(4).forward(x).detach();
  const LoraConfig config = {.r = 8, .lora_alpha = 16, .lora_dropout = 0.05, .target_modules = {"q_proj", "odd_proj"}};
  ToyModule module = toy_module();
  const std::vector<std::string> paths = prepare_qlora(module, config);
  EXPECT_EQ(paths.size(), 4U);
  std::map<std::string, Tensor> frozen;
  std::vector<Tensor> learning;
  for (const auto& item : module.named_parameters())
    if (item.value().requires_grad())
      learning.push_back(item.value());
    else
      frozen[item.key()] = item.value().clone();
  EXPECT_EQ(learning.size(), 8U);  // two matrices for each
  const auto loss = [&] { return torch::mse_loss(module.forward(x), target); };
  torch::optim::Adam adam(learning, 1e-2);
  const double before = loss().item<double>();
  for (int i = 0; i < 25; ++i) {
    adam.zero_grad();
    loss().backward();
    adam.step();
  }
  module.eval();
  const double after = loss().item<double>();
  EXPECT_LT(after, 0.9 * before);
  for (const auto& [name, tensor] : frozen) EXPECT_TRUE(torch::equal(module.named_parameters()[name], tensor)) << name;

  save_lora(module, config, folder / "adapter");
  ToyModule other = toy_module();
  quantize_model(other, qlora_base());
  load_lora(other, folder / "adapter");
  other.eval();
  const torch::NoGradGuard no_gradients;
  EXPECT_TRUE(torch::allclose(other.forward(x), module.forward(x), 1e-2, 5e-2));  // products in bfloat16
  const LoraMergeReport report = merge_lora(module, LoraMerge::requantize, [&] { return loss().item<double>(); });
  EXPECT_EQ(report.layers, 4);
  EXPECT_NEAR(*report.loss_before, after, 1e-6);
  EXPECT_GT(report.relative_error, 0);
  EXPECT_TRUE(is_model_quantized(module));
  EXPECT_EQ(module.named_parameters().keys(), toy_module().named_parameters().keys());
}

// ---- What is wrong is one line, and nothing is lost ----

TEST(TrainingRun, WhatIsMissingOrDoesNotFitIsOneLine) {
  Runs runs;
  const auto code = [&](const std::string& yaml, const std::vector<std::string>& set) {
    return error_of([&] { runs.run(yaml, set); }).code();
  };
  EXPECT_EQ(code("", {"architecture=", "model=" + (runs.folder / "nothing").string()}), "cannot-open");
  EXPECT_EQ(code("", {"architecture=" + (runs.folder / "nothing").string()}), "cannot-open");
  EXPECT_EQ(code("", {"tokenizer=" + (runs.folder / "nothing").string()}), "cannot-open");
  EXPECT_EQ(code("", {"data.text=" + (runs.folder / "nothing").string()}), "cannot-open");
  EXPECT_EQ(code("", {"data.text="}), "missing-text");
  EXPECT_EQ(code("", {"architecture={"}), "bad-config");
  test::write_file(runs.folder / "short", "Once");
  EXPECT_EQ(code("", {"data.text=" + (runs.folder / "short").string()}), "text-too-short");
  EXPECT_EQ(code("", {"architecture.vocab_size=50"}), "vocabulary-mismatch");
  EXPECT_EQ(code("quantization_mode: ptq\nquantization: {method: gguf}\n", {}), "bad-value");
  EXPECT_EQ(code("lora: {r: 4, target_modules: [nothing]}\n", {}), "no-target");
  test::write_file(runs.folder / "file", "x");
  EXPECT_EQ(code("", {"output=" + (runs.folder / "file").string()}), "output-exists");
  EXPECT_THROW(runs.run("", {"output=" + (runs.folder / "file" / "out").string()}), fs::filesystem_error);
  fs::create_directories(runs.folder / "full");
  test::write_file(runs.folder / "full" / "mine", "x");
  EXPECT_EQ(code("", {"output=" + (runs.folder / "full").string()}), "output-exists");
  EXPECT_EQ(test::read_file(runs.folder / "full" / "mine"), "x");
}

TEST(TrainingRun, AFinishedRunIsRemovedOnlyForOneThatBegins) {
  Runs runs;
  runs.run("");
  const auto kept = [&] { return fs::exists(runs.output() / "checkpoints" / "step-00000002" / "model.safetensors"); };
  EXPECT_EQ(error_of([&] { runs.run(""); }).code(), "output-exists");
  test::write_file(runs.folder / "short", "Once");
  const std::vector<std::string> bad[] = {{"data.text=" + (runs.folder / "short").string()},
                                          {"architecture.vocab_size=50"},
                                          {"lora.r=4", "lora.target_modules=nothing"},
                                          {"quantization_mode=qat", "quantization.method=nf4", "batch_size=0"}};
  for (const auto& set : bad) {
    EXPECT_THROW(runs.run("", set, false, /*force=*/true), Error);
    EXPECT_TRUE(kept());
  }
  runs.run("", {"max_steps=1"}, false, /*force=*/true);
  EXPECT_FALSE(kept());
}

TEST(TrainingRun, NaNStopsAndKeepsTheLastGoodCheckpoint) {
  for (const char* yaml : {"", "quantization_mode: qat\n", "enable_quantized_finetuning: true\n"}) {
    Runs runs;
    runs.run(yaml, {"checkpoint_every=1"});
    const Error error = error_of([&] {
      runs.run(yaml, {"max_steps=40", "learning_rate=1e6", "max_grad_norm=0"}, /*resume=*/true);
    });
    EXPECT_EQ(error.code(), "not-finite") << error.what();
    EXPECT_NE(std::string(error.what()).find("training stopped: step "), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("step-00000002 with --resume"), std::string::npos) << error.what();
    EXPECT_EQ(runs.run(yaml, {"max_steps=3"}, /*resume=*/true)["steps"], 3);
  }
}

TEST(TrainingRun, UpdatesInBackwardRefuseWhatTheyWouldIgnore) {
  const auto model = std::make_shared<LanguageModel>();
  const auto tuning = enable_quantized_finetuning(*model, {.update_in_backward = true});
  TrainingConfig config;
  const auto refused = [&] { return error_of([&] { Trainer(trainable(model), config, tuning); }).report().why; };
  EXPECT_NE(refused().find("max_grad_norm 1"), std::string::npos);
  config.max_grad_norm = 0;
  config.gradient_accumulation_steps = 2;
  EXPECT_NE(refused().find("a step's 16 sequences need 2 backward()"), std::string::npos);
  config.gradient_accumulation_steps = 1;
  config.max_steps = 2;
  Trainer trainer(trainable(model), config, tuning);
  const Tensor tokens = torch::arange(4 * 9).reshape({4, 9}).square().remainder(23);
  const auto before = tuning->state();
  trainer.training_step(tokens);
  EXPECT_FALSE(before.at("out.codes").equal(tuning->state().at("out.codes")));
}

}  // namespace
}  // namespace bitwright
