#include "train/lora.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/json.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/checkpoints.hpp"
#include "tests/support.hpp"
#include "train/keep_frozen.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

/// Two layers under paths as models have them, and a head.
struct Net : torch::nn::Module {
  Net() {
    torch::manual_seed(3);
    up = register_module("up_proj", torch::nn::Linear(64, 96));
    down = register_module("down_proj", torch::nn::Linear(torch::nn::LinearOptions(96, 64).bias(false)));
    head = register_module("lm_head", torch::nn::Linear(torch::nn::LinearOptions(64, 10).bias(false)));
  }
  Tensor forward(const Tensor& x) { return head(torch::relu(down(torch::relu(up(x))))); }
  torch::nn::Linear up{nullptr}, down{nullptr}, head{nullptr};
};

std::string refused(const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code() + ": " + error.what();
  }
  return "accepted";
}

std::vector<std::string> learning(const torch::nn::Module& module) {
  std::vector<std::string> names;
  for (const auto& item : module.named_parameters())
    if (item.value().requires_grad()) names.push_back(item.key());
  return names;
}

/// As if trained: B is no longer zero.
void stir(torch::nn::Module& module) {
  const torch::NoGradGuard no_gradients;
  for (const AdaptedLayer& layer : adapted_layers(module)) layer.lora->b()->weight.normal_(0, 0.05);
}

TEST(Lora, OnlyTheAdaptersLearnAndTheStartIsTheBase) {
  Net net;
  const Tensor x = torch::randn({5, 64}), before = net.forward(x);
  EXPECT_EQ(add_lora(net, {.r = 4}), (std::vector<std::string>{"up_proj", "down_proj"}));
  EXPECT_TRUE(torch::equal(net.forward(x), before));
  EXPECT_EQ(learning(net), (std::vector<std::string>{"up_proj.lora_A.weight", "up_proj.lora_B.weight",
                                                     "down_proj.lora_A.weight", "down_proj.lora_B.weight"}));
  net.forward(x).square().sum().backward();
  EXPECT_GT(adapted_layers(net)[0].lora->b()->weight.grad().abs().sum().item<float>(), 0);
  EXPECT_FALSE(parameter_of(*net.up).grad().defined());
}

TEST(Lora, IsTheWeightPlusScaledProduct) {
  for (const bool rank_stabilized : {false, true}) {
    Net net;
    const Tensor x = torch::randn({2, 3, 64}), w = net.up->weight.detach().clone(), bias = net.up->bias.detach();
    add_lora(net, {.r = 4, .lora_alpha = 12, .target_modules = {"up_*"}, .use_rslora = rank_stabilized});
    stir(net);
    const auto lora = adapted_layers(net).at(0).lora;
    const double scaling = rank_stabilized ? 6 : 3;
    const Tensor expected = torch::linear(x, w + scaling * at::mm(lora->b()->weight, lora->a()->weight), bias);
    EXPECT_TRUE(torch::allclose(net.up(x), expected, 1e-4, 1e-5));
  }
}

TEST(Lora, DropoutActsInTrainingAlone) {
  Net net;
  add_lora(net, {.r = 4, .lora_dropout = 0.5});
  stir(net);
  const Tensor x = torch::randn({8, 64});
  net.eval();
  EXPECT_TRUE(torch::equal(net.forward(x), net.forward(x)));
  net.train();
  EXPECT_FALSE(torch::equal(net.forward(x), net.forward(x)));
}

TEST(Lora, RefusesWhatCannotBe) {
  Net net;
  const auto with = [&](const LoraConfig& config) { return refused([&] { add_lora(net, config); }); };
  EXPECT_NE(with({.r = 0}).find("r is 0"), std::string::npos);
  EXPECT_NE(with({.lora_alpha = -1}).find("lora_alpha is -1"), std::string::npos);
  EXPECT_NE(with({.lora_dropout = 1}).find("lora_dropout is 1"), std::string::npos);
  EXPECT_NE(with({.init_lora_weights = "pissa"}).find("'pissa'"), std::string::npos);
  EXPECT_NE(with({.target_modules = {"up_proj", "q_proj"}}).find("no-target: "), std::string::npos);
  EXPECT_NE(with({.init_lora_weights = "loftq"}).find("prepare_qlora"), std::string::npos);
  EXPECT_TRUE(adapted_layers(net).empty());
  EXPECT_EQ(learning(net).size(), 4u);  // refused before anything was frozen
  add_lora(net, {.target_modules = {"up_proj"}});
  EXPECT_NE(with({}).find("already-adapted: "), std::string::npos);
}

/// SPECIFICATION D7.
TEST(QLora, TrainsSavesMerges) {
  Net net;
  bitwright::prepare_qlora(net, {.r = 4, .lora_alpha = 8});
  for (const AdaptedLayer& layer : adapted_layers(net)) {
    const auto base = std::dynamic_pointer_cast<QuantizedLinearBehaviour>(layer.lora->base());
    ASSERT_NE(base, nullptr);
    EXPECT_EQ(base->scheme().element->name, "nf4");
    EXPECT_FALSE(base->scheme().scale->scheme->is_plain());  // double quantization
    EXPECT_EQ(parameter_of(*layer.layer).scalar_type(), torch::kUInt8);
  }
  EXPECT_EQ(behaviour_of(*net.head), nullptr);
  EXPECT_EQ(learning(net).size(), 4u);

  // Trains.
  const Tensor x = torch::randn({32, 64}), target = torch::randn({32, 10});
  const auto loss = [&] { return torch::mse_loss(net.forward(x), target); };
  std::vector<Tensor> parameters;
  for (const Tensor& p : net.parameters())
    if (p.requires_grad()) parameters.push_back(p);
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-2));
  const double start = loss().item<double>();
  for (int step = 0; step < 60; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  const double trained = loss().item<double>();
  EXPECT_LT(trained, 0.5 * start);

  // Saves and loads.
  const test::TemporaryDirectory dir;
  save_lora(net, {.r = 4, .lora_alpha = 8}, dir / "adapter");
  save_lora(net, {.r = 4, .lora_alpha = 8}, dir / "adapter");  // an adapter is replaced
  Net again;
  bitwright::prepare_qlora(again, {.r = 4, .lora_alpha = 8});
  EXPECT_EQ(load_lora(again, dir / "adapter").lora_alpha, 8);
  EXPECT_TRUE(torch::equal(again.forward(x), net.forward(x)));

  // Merges into floats.
  const LoraMergeReport floats =
      merge_lora(again, LoraMerge::floats, [&] { return torch::mse_loss(again.forward(x), target).item<double>(); });
  EXPECT_EQ(floats.layers, 2);
  EXPECT_NEAR(*floats.loss_before, trained, 1e-6);
  EXPECT_NEAR(*floats.loss, trained, 1e-4);
  EXPECT_TRUE(adapted_layers(again).empty());
  EXPECT_EQ(again.up->weight.scalar_type(), torch::kFloat32);
  EXPECT_EQ(again.parameters().size(), 4u);

  // Merges into the base's scheme, and says what that costs.
  const auto measured = [&] { return loss().item<double>(); };
  const LoraMergeReport report = merge_lora(net, LoraMerge::requantize, measured);
  EXPECT_NEAR(*report.loss_floats, trained, 1e-4);
  EXPECT_EQ(*report.loss, measured());
  EXPECT_GT(report.relative_error, 0.01);
  EXPECT_LT(report.relative_error, 0.2);
  EXPECT_EQ(parameter_of(*net.up).scalar_type(), torch::kUInt8);
  EXPECT_EQ(behaviour_as<QuantizedLinearBehaviour>(*net.up)->scheme().element->name, "nf4");
  EXPECT_NE(refused([&] { merge_lora(net, LoraMerge::floats); }).find("no-adapter: "), std::string::npos);
}

TEST(QLora, MergedWithoutMeasuringIsTheSame) {
  Net one, two;
  for (Net* net : {&one, &two}) {
    torch::manual_seed(8);
    bitwright::prepare_qlora(*net, {.r = 4});
    stir(*net);
  }
  const LoraMergeReport measured = merge_lora(one, LoraMerge::requantize, [] { return 0.0; });
  const LoraMergeReport plain = merge_lora(two, LoraMerge::requantize);
  EXPECT_EQ(measured.relative_error, plain.relative_error);
  EXPECT_TRUE(torch::equal(parameter_of(*one.up), parameter_of(*two.up)));
  EXPECT_FALSE(plain.loss.has_value());
}

/// The start is nearer to the float model than quantizing alone, and more iterations take nothing away.
TEST(QLora, LoftQStartsNearerToTheFloats) {
  const auto error = [](const std::string& init, int64_t iterations) {
    Net net;
    const Tensor w = net.up->weight.detach().clone();
    bitwright::prepare_qlora(net,
                             {.r = 16, .lora_alpha = 32, .init_lora_weights = init, .loftq_iterations = iterations},
                             {.method = "quanto_int2"});
    EXPECT_EQ(learning(net).size(), 4u);
    return (merged_weight(*adapted_layers(net).at(0).lora) - w).norm().item<double>();
  };
  const double plain = error("default", 1), once = error("loftq", 1), often = error("loftq", 3);
  EXPECT_LT(once, 0.9 * plain);
  EXPECT_LE(often, once);
}

struct Adapter {
  Adapter() {
    add_lora(net, {.r = 4, .lora_alpha = 6});
    stir(net);
    save_lora(net, {.r = 4, .lora_alpha = 6, .lora_dropout = 0.1, .base_model = "some/base"}, dir / "a");
  }
  std::filesystem::path config() const { return dir / "a" / "adapter_config.json"; }
  /// Loading what `edit` makes of the configuration.
  std::string edited(const std::function<void(Json&)>& edit) const {
    Json json = parse_json(test::read_file(config()), "");
    const std::string before = json.dump();
    edit(json);
    test::write_file(config(), json.dump());
    Net fresh;
    const std::string answer = refused([&] { load_lora(fresh, dir / "a"); });
    EXPECT_TRUE(answer == "accepted" || adapted_layers(fresh).empty());
    test::write_file(config(), before);
    return answer;
  }
  Net net;
  test::TemporaryDirectory dir;
};

TEST(LoraFiles, AreThoseOfPeft) {
  const Adapter adapter;
  const Json json = parse_json(test::read_file(adapter.config()), "");
  EXPECT_EQ(json["peft_type"], "LORA");
  EXPECT_EQ(json["task_type"], "CAUSAL_LM");
  EXPECT_EQ(json["r"], 4);
  EXPECT_TRUE(json["lora_alpha"].is_number_integer());
  EXPECT_EQ(json["lora_alpha"], 6);
  EXPECT_EQ(json["lora_dropout"], 0.1);
  EXPECT_EQ(json["bias"], "none");
  EXPECT_EQ(json["fan_in_fan_out"], false);
  EXPECT_EQ(json["base_model_name_or_path"], "some/base");
  EXPECT_EQ(json["target_modules"], (Json{"down_proj", "up_proj"}));
  const Checkpoint file(adapter.dir / "a" / "adapter_model.safetensors");
  std::map<std::string, Shape> shapes;
  for (const TensorEntry& entry : file.tensors()) shapes[entry.name] = entry.shape;
  EXPECT_EQ(shapes, (std::map<std::string, Shape>{{"base_model.model.up_proj.lora_A.weight", {4, 64}},
                                                  {"base_model.model.up_proj.lora_B.weight", {96, 4}},
                                                  {"base_model.model.down_proj.lora_A.weight", {4, 96}},
                                                  {"base_model.model.down_proj.lora_B.weight", {64, 4}}}));
}

TEST(LoraFiles, NameLayersByPathsWhereNamesWouldMeanMore) {
  struct Two : torch::nn::Module {
    Two() {
      first = register_module("first", std::make_shared<Net>());
      second = register_module("second", std::make_shared<Net>());
    }
    std::shared_ptr<Net> first, second;
  } model;
  const LoraConfig config = {.r = 2, .target_modules = {"first.up_proj"}};
  EXPECT_EQ(add_lora(model, config), std::vector<std::string>{"first.up_proj"});
  const test::TemporaryDirectory dir;
  save_lora(model, config, dir / "a");
  EXPECT_EQ(read_lora_config(dir / "a").target_modules, std::vector<std::string>{"first.up_proj"});
}

TEST(LoraFiles, RoundTrip) {
  Adapter adapter;
  Net fresh;
  const LoraConfig config = load_lora(fresh, adapter.dir / "a");
  EXPECT_EQ(config.r, 4);
  EXPECT_EQ(config.lora_alpha, 6);
  EXPECT_EQ(config.lora_dropout, 0.1);
  fresh.eval();
  adapter.net.eval();
  const Tensor x = torch::randn({5, 64});
  EXPECT_TRUE(torch::equal(fresh.forward(x), adapter.net.forward(x)));
  EXPECT_EQ(adapter.edited([](Json& json) { json["target_modules"] = ".*(up|down)_proj"; }), "accepted");
  EXPECT_EQ(adapter.edited([](Json& json) { json["target_modules"] = "all-linear"; }), "accepted");
}

TEST(LoraFiles, RefuseWhatDoesNotFit) {
  const Adapter adapter;
  const auto says = [&](const std::function<void(Json&)>& edit, const std::string& words) {
    const std::string answer = adapter.edited(edit);
    EXPECT_TRUE(answer.starts_with("bad-adapter: ")) << answer;
    EXPECT_NE(answer.find(words), std::string::npos) << answer;
  };
  says([](Json& json) { json["r"] = 8; }, "lora_A.weight' is [4, 96], the model's layer and r make it [8, 96]");
  says([](Json& json) { json["r"] = -1; }, "'r' is -1");
  says([](Json& json) { json["r"] = 0; }, "r is 0");
  says([](Json& json) { json["lora_alpha"] = "6"; }, "'lora_alpha' is");
  says([](Json& json) { json["target_modules"] = {"up_proj"}; }, "down_proj.lora_A.weight' belongs to no layer");
  says([](Json& json) { json["target_modules"].push_back("lm_head"); }, "lm_head.lora_A.weight' is missing");
  says([](Json& json) { json["target_modules"] = {1}; }, "'target_modules' is no list of names");
  says([](Json& json) { json["peft_type"] = "IA3"; }, "peft_type is 'IA3'");
  says([](Json& json) { json["use_dora"] = true; }, "use_dora");
  says([](Json& json) { json["rank_pattern"]["up_proj"] = 2; }, "rank_pattern");
  says([](Json& json) { json["bias"] = "all"; }, "bias is 'all'");
  Net fresh;
  EXPECT_NE(refused([&] { load_lora(fresh, adapter.dir / "none"); }).find("none"), std::string::npos);
  EXPECT_NE(refused([&] { save_lora(fresh, {}, adapter.dir / "b"); }).find("no-adapter: "), std::string::npos);

  // Every truncation of the weights is refused.
  const std::filesystem::path weights = adapter.dir / "a" / "adapter_model.safetensors";
  const std::string whole = test::read_file(weights);
  for (size_t bytes = 0; bytes < whole.size(); bytes += 97) {
    test::write_file(weights, whole.substr(0, bytes));
    EXPECT_NE(refused([&] { load_lora(fresh, adapter.dir / "a"); }), "accepted") << bytes;
  }
}

/// A checkpoint of a small Llama, its linear layers in nf4 with nested scales.
void write_quantized_llama(const std::filesystem::path& dir) {
  const Json config = {{"architectures", {"LlamaForCausalLM"}},
                       {"model_type", "llama"},
                       {"hidden_size", 32},
                       {"intermediate_size", 64},
                       {"num_hidden_layers", 2},
                       {"num_attention_heads", 2},
                       {"num_key_value_heads", 1},
                       {"vocab_size", 50},
                       {"max_position_embeddings", 64},
                       {"rms_norm_eps", 1e-5},
                       {"rope_theta", 10000.0},
                       {"tie_word_embeddings", false}};
  const CausalLm model(config);
  Scheme nested = {.element = find_element("int8"), .scale = parameter(Grouping::flat(256), plain(DType::f32))};
  const Scheme nf4 = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), nested)};
  test::Tensors tensors;
  for (const auto& item : model.named_parameters()) {
    const Tensor values = (item.value().detach() * 10).contiguous();
    const bool quantizes = item.key().find("_proj.") != std::string::npos;
    tensors[item.key()] = encode(quantizes ? nf4 : plain(DType::f32), values.sizes().vec(),
                                 {values.data_ptr<float>(), static_cast<size_t>(values.numel())});
  }
  test::write_checkpoint(dir, config, tensors);
}

TEST(QLora, ALoadedModelKeepsItsQuantizedWeights) {
  const test::TemporaryDirectory dir;
  write_quantized_llama(dir.path());
  const Checkpoint checkpoint(dir.path());
  CausalLmOptions options;
  options.load_linear = keep_quantized;
  options.recompute_layers = true;
  CausalLm kept(checkpoint, options), floats(checkpoint);
  const Tensor tokens = torch::randint(0, 50, {2, 9});
  EXPECT_TRUE(torch::allclose(kept.forward(tokens), floats.forward(tokens), 1e-3, 1e-4));
  int64_t quantized = 0;
  for_each_linear(kept, [&](const std::string&, torch::nn::LinearImpl& layer) {
    quantized += behaviour_as<QuantizedLinearBehaviour>(layer) != nullptr ? 1 : 0;
  });
  EXPECT_EQ(quantized, 14);

  // An adapter learns on it, through layers that are computed again.
  add_lora(kept, {.r = 2, .target_modules = {"q_proj", "down_proj"}});
  EXPECT_EQ(adapted_layers(kept).size(), 4u);
  kept.loss(tokens, tokens).backward();
  for (const AdaptedLayer& layer : adapted_layers(kept))
    EXPECT_GT(layer.lora->b()->weight.grad().abs().sum().item<float>(), 0) << layer.path;
}

}  // namespace
}  // namespace bitwright::train
