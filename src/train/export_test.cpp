#include "train/export.hpp"

#include <fmt/format.h>

#include <cstring>
#include <random>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "kernels/encode.hpp"
#include "model/model.hpp"
#include "model/open_model.hpp"
#include "recipe/recipe.hpp"
#include "tests/support.hpp"
#include "tokenizer/tokenizer.hpp"
#include "train/causal_lm.hpp"
#include "train/linear.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

/// A layer that computes with the decoded values of a quantized weight.
struct Frozen : LinearBehaviour, StoresQuantized {
  Frozen(StoredLinear linear_kept, const torch::nn::LinearImpl& linear)
      : kept(std::move(linear_kept)), floats(torch::tensor(decode(*kept.weight)).view(linear.weight.sizes())) {}
  Frozen(const Scheme& scheme, const torch::nn::LinearImpl& linear, QuantizedLinear ranges = {})
      : Frozen({std::make_shared<const QuantizedTensor>(encoded(scheme, linear.weight)), std::move(ranges)}, linear) {}
  Tensor forward(const Tensor& input, const Tensor& bias) override { return torch::linear(input, floats, bias); }
  StoredLinear stored() const override { return kept; }

  static QuantizedTensor encoded(const Scheme& scheme, const Tensor& weight) {
    const Tensor values = weight.detach().to(torch::kFloat32).contiguous();
    return encode(scheme, weight.sizes().vec(),
                  std::span(values.data_ptr<float>(), static_cast<size_t>(values.numel())));
  }
  StoredLinear kept;
  Tensor floats;
};

void quantize_layers(CausalLm& module, const Scheme& scheme, const QuantizedLinear& ranges = {}) {
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& linear) {
    if (path.ends_with("lm_head")) return;
    const auto frozen = std::make_shared<Frozen>(scheme, linear, ranges);
    attach(linear, frozen, torch::empty({0}));
  });
}

Json llama(int64_t hidden = 64) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", hidden},
          {"intermediate_size", 2 * hidden},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 96},
          {"max_position_embeddings", 64}};
}
Json gpt2() {
  return {{"architectures", {"GPT2LMHeadModel"}},
          {"model_type", "gpt2"},
          {"n_embd", 64},
          {"n_layer", 2},
          {"n_head", 4},
          {"vocab_size", 96},
          {"n_positions", 32}};
}

Scheme integers(int bits, bool is_signed, int64_t group, DType scales = DType::f32) {
  return {.element = &integer_element(bits, is_signed), .scale = parameter(Grouping::along(group), plain(scales))};
}

/// Of the runtime's logits for what was written from the module's, which are not all alike.
double difference(CausalLm& module, const fs::path& written) {
  const Checkpoint checkpoint = open_model(written);
  const Model model(checkpoint);
  std::vector<int32_t> tokens(24);
  std::mt19937 random(5);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 96);
  KvCache cache(model.config(), 24);
  std::vector<float> native = model.forward(tokens, cache);
  const torch::NoGradGuard no_gradients;
  const Tensor logits =
      module.forward(torch::tensor(std::vector<int64_t>(tokens.begin(), tokens.end())).unsqueeze(0)).flatten();
  EXPECT_EQ(logits.numel(), static_cast<int64_t>(native.size()));
  EXPECT_GT(logits.std().item<double>(), 0.01);
  return (logits - torch::from_blob(native.data(), {logits.numel()})).abs().max().item<double>();
}

ExportOptions to(const fs::path& path, const Container* container) {
  return {.output = {.output = path}, .container = container};
}
ExportOptions to(const fs::path& path, const char* container) {
  return to(path, container == nullptr ? nullptr : find_container(container));
}

/// As the container's owner rounds, where it has a way of its own.
QuantizedTensor encoded(const Container& container, const Scheme& scheme, const Tensor& weight) {
  const Tensor values = weight.detach().to(torch::kFloat32).contiguous();
  const std::span floats(values.data_ptr<float>(), static_cast<size_t>(values.numel()));
  const Shape shape = values.sizes().vec();
  if (container.encode != nullptr) return container.encode(scheme, shape, {DType::f32, std::as_bytes(floats)});
  return encode(scheme, shape, floats);
}

/// What the container's owner does with a weight of this shape, if nothing more is asked for than weights.
Scheme usual_scheme(const Container& container, const Shape& shape) {
  if (container.scheme_for != nullptr) return container.scheme_for(*named_choice("q8_0", container), {}, shape);
  if (container.choices.empty()) return integers(4, true, 32);
  const auto found = std::ranges::find_if(container.choices, &SchemeChoice::weight_only);
  return scheme_of(found == container.choices.end() ? container.choices.front() : *found, container, DType::f32);
}

TEST(Export, EveryContainerThatHoldsTheSchemeGivesTheSameLogits) {
  size_t written = 0, refused = 0;
  for (const Container* container : all_containers()) {
    if (container->write_metadata == nullptr) continue;
    SCOPED_TRACE(container->name);
    const Shape shape = {128, 128};
    const bool gguf = container->scheme_for != nullptr;
    const Scheme scheme = usual_scheme(*container, shape);
    const char* const name = "model.layers.0.mlp.up_proj.weight";
    const bool taken = container->takes == nullptr || gguf || container->takes(name, shape);
    const bool fits = taken && container->fit(scheme, shape).verdict != Verdict::impossible;
    const auto module = std::make_shared<CausalLm>(llama(128));
    if (fits || !taken)
      for_each_linear(*module, [&](const std::string& path, torch::nn::LinearImpl& linear) {
        if (path == "lm_head") return;
        const auto weight = std::make_shared<const QuantizedTensor>(encoded(*container, scheme, linear.weight));
        attach(linear, std::make_shared<Frozen>(StoredLinear{weight}, linear), torch::empty({0}));
      });
    const test::TemporaryDirectory directory;
    const ExportOptions options = to(directory / "out", container);
    const ExportSource source = {.config = OrderedJson(module->config_json())};
    if (!fits) {
      ++refused;
      if (!taken) {
        EXPECT_THROW(export_model(exported_tensors(*module), source, options), Error);
      }
      EXPECT_FALSE(fs::exists(directory / "out"));
      continue;
    }
    ++written;
    export_model(exported_tensors(*module), source, options);
    const fs::path model = gguf ? test::files_in(directory / "out", ".gguf").at(0) : directory / "out";
    const Checkpoint checkpoint = open_model(model);
    ASSERT_EQ(checkpoint.container(), container);
    // Where a container's layers always round their inputs to fp8, the runtime does too and a module of floats does
    // not.
    const bool rounds =
        std::ranges::any_of(checkpoint.tensors(), [](const auto& e) { return e.linear.input.has_value(); });
    const double bound = rounds ? 0.05 : 1e-4;
    EXPECT_LE(difference(*module, model), bound);
    EXPECT_LE(difference(*std::make_shared<CausalLm>(checkpoint), model), bound);
    if (gguf) continue;  // which has its own order of rows
    for_each_linear(*module, [&](const std::string& path, torch::nn::LinearImpl& linear) {
      const auto frozen = behaviour_as<Frozen>(linear);
      if (frozen == nullptr) return;
      EXPECT_EQ(decode(checkpoint.read(*checkpoint.find(path + ".weight"))), decode(*frozen->kept.weight)) << path;
    });
  }
  EXPECT_GE(written, 9u);
  std::cout << "written: " << written << ", refused: " << refused << '\n';
}

TEST(Export, MatricesThatFilesHaveTransposed) {
  Scheme nf4 = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))};
  struct Case {
    const char* container;
    Scheme scheme;
    bool fits;
  };
  const std::array cases = {Case{"native", integers(8, true, 32), true}, Case{"native", nf4, false},
                            Case{"bitsandbytes", nf4, true}, Case{"gptq", integers(4, true, 32, DType::f16), true}};
  for (const Case& c : cases) {
    SCOPED_TRACE(fmt::format("{} {}", c.container, describe(c.scheme)));
    const auto module = std::make_shared<CausalLm>(gpt2());
    quantize_layers(*module, c.scheme);
    const test::TemporaryDirectory directory;
    const ExportSource source = {.config = OrderedJson(module->config_json())};
    const auto run = [&] { export_model(exported_tensors(*module), source, to(directory / "out", c.container)); };
    if (!c.fits) {
      EXPECT_THROW(run(), Error);
      continue;
    }
    run();
    EXPECT_LE(difference(*module, directory / "out"), 1e-4);
  }
}

TEST(Export, PlainFloatsWithAllThatBelongsToAModel) {
  const Checkpoint original(test::example_model());
  const auto module = std::make_shared<CausalLm>(original);
  const test::TemporaryDirectory directory;
  ExportOptions options = to(directory / "out", static_cast<const char*>(nullptr));
  options.output.max_shard_bytes = 4'000'000;  // several files
  export_model(exported_tensors(*module), export_source(original), options);
  EXPECT_LE(difference(*module, directory / "out"), 1e-4);
  const Checkpoint written(directory / "out");
  EXPECT_EQ(written.container(), nullptr);
  EXPECT_GT(test::files_in(directory / "out", ".safetensors").size(), 1u);
  ASSERT_EQ(written.tensors().size(), original.tensors().size());
  for (const TensorEntry& entry : written.tensors())
    EXPECT_EQ(written.read_f32(entry), original.read_f32(*original.find(entry.name)));
  EXPECT_EQ(Tokenizer(directory / "out").encode("Once upon a time"),
            Tokenizer(test::example_model()).encode("Once upon a time"));
  options.output.output = directory / "half";
  options.floats = DType::bf16;
  export_model(exported_tensors(*module), export_source(original), options);
  EXPECT_EQ(Checkpoint(directory / "half").tensors()[0].dtype, DType::bf16);
  EXPECT_EQ(Checkpoint(directory / "half").config()["torch_dtype"], "bfloat16");
}

TEST(Export, RecordAndDigests) {
  const auto module = std::make_shared<CausalLm>(llama());
  quantize_layers(*module, integers(8, true, 32));
  const test::TemporaryDirectory directory;
  ExportOptions options = to(directory / "out", "native");
  options.record = {{"method", "qat"}};
  const ExportSource source = {.config = OrderedJson(module->config_json())};
  export_model(exported_tensors(*module), source, options);
  const Checkpoint written(directory / "out");
  EXPECT_EQ(written.quantization_metadata()["training"]["method"], "qat");
  EXPECT_EQ(written.quantization_metadata()["layers"].size(), 14u);
  EXPECT_NO_THROW(written.verify_digests());
  // A second one is refused, or takes its place.
  EXPECT_THROW(export_model(exported_tensors(*module), source, options), Error);
  options.output.existing = Existing::replace;
  EXPECT_NO_THROW(export_model(exported_tensors(*module), source, options));
}

std::string code_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

TEST(Export, WhatCannotBeWrittenIsRefusedAndLeavesNothing) {
  const test::TemporaryDirectory directory;
  const auto check = [&](CausalLm& module, const char* container, const char* code) {
    const ExportSource source = {.config = OrderedJson(module.config_json())};
    const auto run = [&] { export_model(exported_tensors(module), source, to(directory / "out", container)); };
    EXPECT_EQ(code_of(run), code) << container;
    EXPECT_TRUE(fs::is_empty(directory.path()));
  };
  const auto nf4 = std::make_shared<CausalLm>(llama());
  quantize_layers(*nf4, {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))});
  for (const char* container : {"gptq", "mlx", "compressed-tensors"}) check(*nf4, container, "does-not-fit");
  check(*nf4, "gguf", "does-not-fit");
  const auto wide = std::make_shared<CausalLm>(llama());
  quantize_layers(*wide, integers(8, true, 32, DType::f32));
  check(*wide, "gguf", "not-exact");  // its scales are float16
  const auto broken = std::make_shared<CausalLm>(llama());
  broken->named_parameters()["model.norm.weight"].detach()[3] = std::nanf("");
  check(*broken, nullptr, "not-finite");
  struct Adapter : LinearBehaviour {
    Tensor forward(const Tensor& input, const Tensor&) override { return input; }
  };
  const auto adapted = std::make_shared<CausalLm>(llama());
  for_each_linear(*adapted, [](const std::string&, torch::nn::LinearImpl& linear) {
    attach(linear, std::make_shared<Adapter>(), linear.weight);
  });
  check(*adapted, "native", "not-exportable");
}

TEST(Export, RangesOfActivations) {
  const auto number = [](float value) {
    return std::make_shared<const QuantizedTensor>(
        QuantizedTensor{.scheme = plain(DType::f32),
                        .shape = {1},
                        .codes = Frozen::encoded(plain(DType::f32), torch::tensor({value})).codes});
  };
  const Scheme per_tensor = {.element = &integer_element(8, true),
                             .scale = parameter(Grouping::tensor(), plain(DType::f32))};
  const Scheme per_channel = {.element = &integer_element(8, true),
                              .scale = parameter(Grouping::channel(), plain(DType::f32))};
  const auto module = std::make_shared<CausalLm>(llama());
  quantize_layers(*module, per_channel,
                  {.input = ActivationScheme{.scheme = per_tensor, .dynamic = false, .scale = number(0.03125f)}});
  const test::TemporaryDirectory directory;
  const ExportSource source = {.config = OrderedJson(module->config_json())};
  export_model(exported_tensors(*module), source, to(directory / "out", "compressed-tensors"));
  const Checkpoint written(directory / "out");
  const auto& input = written.find("model.layers.1.mlp.up_proj.weight")->linear.input;
  ASSERT_TRUE(input && !input->dynamic && input->scale);
  EXPECT_EQ(decode(*input->scale), std::vector<float>{0.03125f});
  // One that holds the weights and not these.
  EXPECT_EQ(code_of([&] { export_model(exported_tensors(*module), source, to(directory / "gptq", "gptq")); }),
            "does-not-fit");
  EXPECT_FALSE(fs::exists(directory / "gptq"));
}

/// Any tree of modules with linear layers, without a config.json.
TEST(Export, OtherModules) {
  const torch::nn::Sequential module(torch::nn::Linear(64, 32), torch::nn::BatchNorm1d(32), torch::nn::Linear(32, 64));
  auto& linear = *module->ptr<torch::nn::LinearImpl>(0);
  const auto frozen = std::make_shared<Frozen>(integers(8, true, 32), linear);
  attach(linear, frozen, torch::empty({0}));
  const test::TemporaryDirectory directory;
  export_model(exported_tensors(*module), {}, to(directory / "out", "native"));
  const Checkpoint written(directory / "out");
  EXPECT_EQ(written.read(*written.find("0.weight")), *frozen->kept.weight);
  EXPECT_EQ(written.find("1.num_batches_tracked")->dtype, DType::i64);
  EXPECT_EQ(written.read_f32(*written.find("2.weight")).size(), 2048u);
}

}  // namespace
}  // namespace bitwright::train
