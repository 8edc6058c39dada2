#include "bitwright/torch/adapter.hpp"

#include <gtest/gtest.h>

#include <iostream>
#include <map>
#include <set>

#include "base/error.hpp"
#include "bitwright/engine/backends.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/support.hpp"
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

QuantizationConfig exact(const std::string& method) { return {.method = method, .compute_dtype = "float32"}; }

torch::Tensor outputs(ToyModule& module) {
  const torch::NoGradGuard no_gradients;
  return module.forward(toy_input());
}

std::string scheme_of(const QuantizationInfo& info, const std::string& path) {
  for (const LayerInfo& layer : info.affected)
    if (layer.path == path) return layer.scheme;
  return "floats";
}

TEST(SpecificationD, D1_EachMethodQuantizesAsItsLibrary) {
  struct Case {
    const char* method;
    int64_t bits;
    const char* scheme;
    double error;  ///< of the outputs
  };
  for (const Case& c :
       {Case{"bnb_nf4", 4, "nf4", 0.12}, Case{"bnb_int8", 8, "int8", 0.02}, Case{"hqq", 4, "uint4", 0.15},
        Case{"mlx_int4", 4, "", 0.15}, Case{"mlx_int8", 8, "", 0.01}, Case{"quanto_int2", 2, "", 0.7},
        Case{"quanto_int4", 4, "", 0.15}, Case{"quanto_int8", 8, "", 0.02}}) {
    SCOPED_TRACE(c.method);
    ToyModule module = toy_module();
    const torch::Tensor reference = outputs(module);
    const QuantizationInfo info = quantize_model(module, exact(c.method));
    EXPECT_EQ(info.bits, c.bits);
    EXPECT_EQ(info.mode, "weight_only");
    ASSERT_FALSE(info.affected.empty());
    std::cout << c.method << ": " << info.affected[0].scheme << ", "
              << compare_outputs(reference, outputs(module)).relative << '\n';
    EXPECT_LT(compare_outputs(reference, outputs(module)).relative, c.error);
    EXPECT_EQ(info.skipped.back().path, "lm_head");
  }
  ToyModule module = toy_module();
  EXPECT_EQ(quantize_model(module, exact("none")).bits, 0);
  EXPECT_FALSE(is_model_quantized(module));
}

/// The table of SPECIFICATION D3, word for word.
TEST(SpecificationD, D3_WhichBackendRunsWhichMethod) {
  const std::set<std::string> bnb = {"bnb_nf4", "bnb_int8"}, hqq = {"hqq"}, mlx = {"mlx_int4", "mlx_int8"},
                              quanto = {"quanto_int2", "quanto_int4", "quanto_int8"};
  const auto both = [](std::initializer_list<std::set<std::string>> sets) {
    std::set<std::string> all = {"none"};
    for (const auto& set : sets) all.insert(set.begin(), set.end());
    return all;
  };
  const std::map<std::string, std::set<std::string>> matrix = {{"cuda", both({bnb, hqq, quanto})},
                                                               {"mps", both({hqq, mlx, quanto})},
                                                               {"mlx", both({hqq, mlx})},
                                                               {"cpu", both({hqq, quanto})}};
  const std::set<std::string> all = both({bnb, hqq, mlx, quanto});
  EXPECT_EQ(adapter_methods().size(), all.size());
  for (const auto& [backend, runs] : matrix)
    for (const std::string& method : all) {
      SCOPED_TRACE(backend + " " + method);
      EXPECT_EQ(backend_runs(backend, method), runs.contains(method));
      const auto adapter = create_quantization_adapter(backend, exact(method));
      EXPECT_EQ(adapter->name() == "Fallback", !runs.contains(method) || method == "none");
    }
}

/// Every backend with every method: who runs it, and that what falls back says so and gives the same model.
TEST(SpecificationD, D3_TheMatrixOfBackendsAndMethods) {
  for (const AdapterMethod& method : adapter_methods()) {
    const std::string name(method.name);
    ToyModule ours = toy_module();
    quantize_model(ours, exact(name), "cpu");
    const torch::Tensor expected = outputs(ours);
    for (const std::string backend : {"cuda", "mps", "mlx", "cpu"}) {
      SCOPED_TRACE(backend + " " + name);
      const auto adapter = create_quantization_adapter(backend, exact(name));
      EXPECT_EQ(adapter->backend(), backend);
      const bool runs = backend_runs(backend, name);
      const bool library = runs && method.library != "";
      EXPECT_EQ(adapter->name() != "Fallback", library);
      bool said = false;
      for (const Diagnostic& issue : adapter->issues())
        if (issue.code == "BACKEND_UNSUPPORTED") {
          said = true;
          ASSERT_FALSE(issue.instead.empty());
          EXPECT_TRUE(backend_runs(backend, issue.instead[0]));
        }
      EXPECT_EQ(said, !runs);
      ToyModule module = toy_module();
      const QuantizationInfo info = adapter->quantize_model(module);
      bool warned = false;
      for (const std::string& warning : info.warnings) warned = warned || warning.starts_with("BACKEND_UNSUPPORTED");
      EXPECT_EQ(warned, !runs);
      EXPECT_TRUE(torch::equal(outputs(module), expected));
    }
  }
  EXPECT_EQ(create_quantization_adapter("cuda", exact("bnb_nf4"))->name(), "BitsAndBytes");
  EXPECT_EQ(create_quantization_adapter("cpu", exact("hqq"))->name(), "HQQ");
  EXPECT_EQ(create_quantization_adapter("mlx", exact("mlx_int4"))->name(), "MLX");
  EXPECT_EQ(create_quantization_adapter("mps", exact("quanto_int8"))->name(), "Quanto");
  EXPECT_EQ(create_quantization_adapter("cpu", exact("bnb_nf4"))->name(), "Fallback");
  EXPECT_THROW(create_quantization_adapter("tpu", exact("hqq")), Error);
  EXPECT_THROW(create_quantization_adapter("cpu", exact("hqq5")), Error);
}

TEST(SpecificationD, D2_AdaptersDoEverythingBehindOneInterface) {
  const test::TemporaryDirectory dir;
  using Pair = std::pair<const char*, const char*>;
  for (const auto& [method, container] :
       {Pair("bnb_nf4", "bitsandbytes"), Pair("bnb_int8", "bitsandbytes"), Pair("hqq", "hqq"), Pair("mlx_int4", "mlx"),
        Pair("quanto_int4", "quanto"), Pair("none", "")}) {
    SCOPED_TRACE(method);
    const auto adapter = create_quantization_adapter("cpu", exact(method));
    const torch::nn::Linear linear = adapter->create_quantized_linear(128, 32, false);
    EXPECT_EQ(behaviour_of(*linear) != nullptr, std::string(method) != "none");
    EXPECT_FALSE(linear->bias.defined());
    ToyModule module = toy_module(), other = toy_module(9);
    adapter->quantize_model(module);
    adapter->prepare_model_for_training(module);
    for (const torch::Tensor& parameter : module.parameters()) EXPECT_FALSE(parameter.requires_grad());
    adapter->save_quantized_model(module, dir / method);
    const QuantizationInfo info = adapter->load_quantized_model(other, dir / method);
    EXPECT_TRUE(info.warnings.empty());
    EXPECT_TRUE(torch::equal(outputs(module), outputs(other)));
    const Checkpoint written(dir / method);
    EXPECT_EQ(written.container() == nullptr ? "" : written.container()->name, container);
    EXPECT_EQ(code_of([&] { adapter->save_quantized_model(module, dir / method); }), "output-exists");
  }
}

/// A user's own: every second weight is forgotten.
class Halving : public QuantizationAdapter {
 public:
  using QuantizationAdapter::QuantizationAdapter;
  std::string_view name() const override { return "Halving"; }
  torch::nn::Linear create_quantized_linear(int64_t in, int64_t out, bool bias) override {
    return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias));
  }
  QuantizationInfo quantize_model(torch::nn::Module& model) override { return get_quantization_info(model); }
  void prepare_model_for_training(torch::nn::Module&) override {}
  void save_quantized_model(const torch::nn::Module&, const std::filesystem::path&, const ModelFiles&) override {}
  QuantizationInfo load_quantized_model(torch::nn::Module& model, const std::filesystem::path&) override {
    return get_quantization_info(model);
  }
};

TEST(SpecificationD, D2_UsersAddTheirOwnAdapters) {
  const auto make = [](const std::string& backend, const QuantizationConfig& config) {
    return std::make_unique<Halving>(backend, config);
  };
  register_quantization_adapter("halving", make);
  register_quantization_adapter("hqq", make);
  const auto adapter = create_quantization_adapter("npu", {.method = "halving", .backend_options = {{"every", 2}}});
  EXPECT_EQ(adapter->name(), "Halving");
  EXPECT_EQ(adapter->config().backend_options["every"], 2);
  EXPECT_EQ(create_quantization_adapter("cpu", {.method = "hqq"})->name(), "Halving");
  register_quantization_adapter("halving", nullptr);
  register_quantization_adapter("hqq", nullptr);
  EXPECT_EQ(create_quantization_adapter("cpu", {.method = "hqq"})->name(), "HQQ");
  EXPECT_THROW(create_quantization_adapter("cpu", {.method = "halving"}), Error);
}

TEST(SpecificationD, D4_TheLeastQuantizationThatFitsIsRecommendedAndRuns) {
  const auto bits = [](const std::string& backend, double gigabytes) {
    ToyModule module = toy_module();
    return quantize_model(module, quantization_config_from_json(get_recommended_config(backend, 7, gigabytes)), backend)
        .bits;
  };
  EXPECT_EQ(get_recommended_config("mps", 7, 16)["method"], "mlx_int4");  // the documented example
  EXPECT_EQ(bits("mps", 16), 4);
  EXPECT_EQ(bits("cuda", 16.8), 0);  // with 20 % to spare
  EXPECT_EQ(bits("cuda", 16.7), 8);
  EXPECT_EQ(bits("cuda", 10.4), 4);
  EXPECT_EQ(bits("cpu", 8), 8);
  EXPECT_EQ(bits("cpu", 6), 4);
}

TEST(SpecificationD, D5_MemoryIsWhatWasEstimated) {
  for (const char* method : {"bnb_nf4", "bnb_int8", "hqq", "mlx_int4", "mlx_int8", "quanto_int8"}) {
    torch::manual_seed(1);
    torch::nn::Linear linear(256, 256);
    linear->to(torch::kBFloat16);  // and so are the scales of most
    const QuantizationInfo info = quantize_model(*linear, exact(method));
    const double expected = adapter_bytes(method, 256 * 256);
    EXPECT_NEAR(static_cast<double>(info.bytes), expected, 0.07 * expected) << method;
  }
}

TEST(SpecificationD, D6_LayersHaveTheirOwnBits) {
  ToyModule module = toy_module();
  QuantizationConfig config = exact("mlx_int4");
  config.layer_configs = {
      {"*.1.q_proj", {{"bits", 8}}}, {"layers.0", {{"group_size", 32}}}, {"up_proj", {{"method", "none"}}}};
  config.skip_modules = {};
  const QuantizationInfo info = quantize_model(module, config);
  EXPECT_EQ(scheme_of(info, "layers.1.q_proj").substr(0, 5), "int8 ");
  EXPECT_NE(scheme_of(info, "layers.0.q_proj").find("group 32"), std::string::npos);
  EXPECT_NE(scheme_of(info, "layers.0.odd_proj").find("group 32"), std::string::npos);
  EXPECT_EQ(scheme_of(info, "layers.1.up_proj"), "floats");
  EXPECT_EQ(scheme_of(info, "layers.1.odd_proj"), "floats");  // 96 is no multiple of 64
  EXPECT_NE(scheme_of(info, "lm_head"), "floats");
  ASSERT_FALSE(info.warnings.empty());
  EXPECT_NE(info.warnings.back().find("odd_proj"), std::string::npos);
  const auto bytes = [](bool twice, int64_t group) {
    ToyModule one = toy_module();
    QuantizationConfig c = exact("bnb_nf4");
    c.double_quant = twice;
    c.group_size = group;
    return quantize_model(one, c).bytes;
  };
  EXPECT_LT(bytes(true, 64), bytes(false, 64));
  EXPECT_LT(bytes(false, 128), bytes(false, 64));
}

TEST(SpecificationD, D6_ComputeDtype) {
  ToyModule module = toy_module(), wide = toy_module();
  const torch::Tensor reference = outputs(module);
  quantize_model(module, {.method = "mlx_int8"});  // bfloat16, as in the specification
  quantize_model(wide, exact("mlx_int8"));
  EXPECT_EQ(outputs(module).scalar_type(), torch::kFloat);
  const double narrow = compare_outputs(outputs(wide), outputs(module)).relative;
  EXPECT_GT(narrow, 1e-4);
  EXPECT_LT(narrow, 0.02);
}

TEST(SpecificationD, D8_DirectoriesAndSingleFilesLoad) {
  const test::TemporaryDirectory dir;
  for (const char* method : {"bnb_nf4", "bnb_int8", "hqq", "mlx_int8", "quanto_int8", "none"}) {
    SCOPED_TRACE(method);
    ToyModule module = toy_module(), other = toy_module(7);
    const auto adapter = create_quantization_adapter("cpu", exact(method));
    adapter->quantize_model(module);
    const std::filesystem::path file = dir / (std::string(method) + ".safetensors");
    adapter->save_quantized_model(module, file, {.config = {{"model_type", "toy"}}});
    const Checkpoint written(file);
    EXPECT_EQ(written.config()["model_type"], "toy");
    load_quantized_model(other, file);
    EXPECT_TRUE(torch::equal(outputs(module), outputs(other)));
    EXPECT_EQ(to_json(get_quantization_info(module))["affected_layers"].size(),
              to_json(get_quantization_info(other))["affected_layers"].size());
  }
}

struct Tree : torch::nn::Module {};
/// A module with one linear layer at this path.
std::pair<std::shared_ptr<Tree>, torch::nn::Linear> tree_with(const std::vector<std::string>& path,
                                                              const torch::nn::LinearOptions& options) {
  auto root = std::make_shared<Tree>(), at = root;
  for (size_t i = 0; i + 1 < path.size(); ++i) at = at->register_module(path[i], std::make_shared<Tree>());
  const torch::nn::Linear linear = at->register_module(path.back(), torch::nn::Linear(options));
  return {root, linear};
}

TEST(SpecificationD, D8_FilesOfHqqAndMlxLoad) {
  const auto [hqq, layer] = tree_with({"model", "layers", "0", "new"}, {16, 4});
  const QuantizationInfo info = load_quantized_model(*hqq, "tests/golden/torch/hqq.pt");
  EXPECT_EQ(info.bits, 4);
  EXPECT_EQ(info.warnings.size(), 4U);  // a norm and two other layers
  const torch::Tensor one = torch::eye(16), weight = torch::linear(one, layer->weight).t();
  for (int64_t i = 0; i < 64; ++i)
    EXPECT_EQ(weight[i / 16][i % 16].item<float>(),
              (static_cast<float>(i * 7 % 16) - static_cast<float>(i / 8)) * 0.5F);

  const test::TemporaryDirectory dir;
  std::filesystem::copy_file("tests/golden/npz/mlx.npz", dir / "weights.npz");
  test::write_file(dir / "config.json", R"({"model_type": "toy", "quantization": {"group_size": 32, "bits": 4}})");
  const auto [mlx, first] = tree_with({"layers", "0"}, torch::nn::LinearOptions(64, 2).bias(false));
  EXPECT_EQ(load_quantized_model(*mlx, dir.path()).bits, 4);
  const torch::Tensor values = torch::linear(torch::eye(64), first->weight).t();
  for (int64_t i = 0; i < 128; ++i)  // bytes count up, the low nibble first; times 1, less 0.5
    EXPECT_EQ(values[i / 64][i % 64].item<float>(), static_cast<float>(((i / 2) >> (i % 2 * 4)) & 15) - 0.5F);
}

/// GPT-2's files have the matrices of its linear layers [inputs, outputs], square ones too.
TEST(SpecificationD, D8_MatricesThatFilesHaveTransposed) {
  const test::TemporaryDirectory dir;
  const auto make = [](uint64_t seed) {
    torch::manual_seed(seed);
    auto root = std::make_shared<Tree>(), block = root->register_module("h", std::make_shared<Tree>());
    block->register_module("c_attn", torch::nn::Linear(64, 192));
    block->register_module("c_proj", torch::nn::Linear(64, 64));
    root->register_module("head", torch::nn::Linear(64, 64));
    return root;
  };
  const ModelFiles gpt2 = {.config = {{"model_type", "gpt2"}}};
  const auto expect_equal = [](const Tree& a, const Tree& b) {
    for (const std::string path : {"h.c_attn", "h.c_proj", "head"}) {
      const auto layer = [&](const Tree& tree) { return tree.named_modules()[path]->as<torch::nn::Linear>(); };
      const torch::Tensor x = torch::eye(64);
      EXPECT_TRUE(torch::equal(layer(a)->forward(x), layer(b)->forward(x))) << path;
    }
  };
  const auto module = make(1);
  save_quantized_model(*module, dir / "floats", "native", gpt2);
  const Checkpoint written(dir / "floats");
  EXPECT_EQ(written.find("h.c_attn.weight")->shape, (Shape{64, 192}));
  EXPECT_EQ(written.find("head.weight")->shape, (Shape{64, 64}));
  const torch::Tensor square = torch::tensor(written.read_f32(*written.find("h.c_proj.weight"))).reshape({64, 64});
  EXPECT_TRUE(torch::equal(square, module->named_parameters()["h.c_proj.weight"].detach().t()));
  const auto same = make(2);
  load_quantized_model(*same, dir / "floats");
  expect_equal(*module, *same);
  for (const char* format : {"native", "bitsandbytes"}) {
    SCOPED_TRACE(format);
    const auto quantized = make(1), back = make(3);
    quantize_model_ptq(*quantized, {.type = "weight_only", .format = format});
    const std::string code = code_of([&] { save_quantized_model(*quantized, dir / format, format, gpt2); });
    if (code != "none") {  // refused by name, or kept
      EXPECT_EQ(code, "does-not-fit");
      EXPECT_NE(std::string(format), "native");
      continue;
    }
    load_quantized_model(*back, dir / format);
    expect_equal(*quantized, *back);
  }
}

TEST(SpecificationD, D8_StatusSaysWhatIsUsableHere) {
  for (const auto& row : report_import_status()) EXPECT_EQ(row["usable"], true) << row["method"];
}

TEST(SpecificationD, D8_WhatDoesNotMatchIsRefusedAndNothingChanges) {
  const test::TemporaryDirectory dir;
  torch::manual_seed(1);
  torch::nn::Sequential small(torch::nn::Linear(64, 64)), larger(torch::nn::Linear(64, 64), torch::nn::Linear(64, 64)),
      wider(torch::nn::Linear(64, 128));
  save_quantized_model(*small, dir / "small");
  EXPECT_EQ(code_of([&] { load_quantized_model(*larger, dir / "small"); }), "missing-tensor");
  EXPECT_EQ(code_of([&] { load_quantized_model(*wider, dir / "small"); }), "wrong-shape");
  EXPECT_FALSE(is_model_quantized(*larger));
  EXPECT_EQ(code_of([&] { save_quantized_model(*small, dir / "x", "gguf"); }), "unknown-format");
  EXPECT_EQ(code_of([&] { load_quantized_model(*small, dir / "nothing"); }), "cannot-open");
  quantize_model(*small, exact("hqq"));
  EXPECT_EQ(code_of([&] { save_quantized_model(*small, dir / "x", "mlx"); }), "does-not-fit");
  EXPECT_FALSE(std::filesystem::exists(dir / "x"));
  save_quantized_model(*larger, dir / "larger");
  EXPECT_EQ(load_quantized_model(*small, dir / "larger").warnings.size(), 2U);  // a weight and a bias too many
}

}  // namespace
}  // namespace bitwright
