#include "train/causal_lm.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/CPUAllocator.h>
#include <fmt/format.h>

#include <cstring>
#include <random>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/weight_file.hpp"
#include "kernels/encode.hpp"
#include "model/model.hpp"
#include "model/open_model.hpp"
#include "tests/checkpoints.hpp"
#include "tests/support.hpp"
#include "train/linear.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

std::vector<int32_t> some_tokens(int64_t count, int64_t vocabulary) {
  std::mt19937 random(7);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary));
  return tokens;
}

Tensor as_tensor(const std::vector<int32_t>& tokens) {
  return torch::tensor(std::vector<int64_t>(tokens.begin(), tokens.end())).unsqueeze(0);
}

Tensor random_tokens(int64_t batch, int64_t length, int64_t vocabulary) {
  return torch::randint(vocabulary, {batch, length}, at::detail::createCPUGenerator(3), torch::kInt64);
}

/// Of the module's logits from the runtime's.
double difference(const Checkpoint& checkpoint, const std::vector<int32_t>& tokens) {
  const Model model(checkpoint);
  KvCache cache(model.config(), static_cast<int64_t>(tokens.size()));
  std::vector<float> expected = model.forward(tokens, cache);
  const auto module = std::make_shared<CausalLm>(checkpoint);
  const torch::NoGradGuard no_gradients;
  const Tensor logits = module->forward(as_tensor(tokens));
  EXPECT_EQ(logits.numel(), static_cast<int64_t>(expected.size()));
  return (logits.flatten() - torch::from_blob(expected.data(), {logits.numel()})).abs().max().item<double>();
}

std::vector<int32_t> tokens_of(const fs::path& reference) {
  const WeightFile file(reference / "expected.safetensors");
  for (const StoredArray& array : file.arrays())
    if (array.name == "tokens") {
      std::vector<int32_t> tokens(array.data.size() / sizeof(int32_t));
      std::memcpy(tokens.data(), array.data.data(), array.data.size());
      return tokens;
    }
  throw std::runtime_error("no tokens");
}

std::vector<fs::path> references() {
  std::vector<fs::path> found;
  if (fs::is_directory(BITWRIGHT_REFERENCES))
    for (const auto& entry : fs::directory_iterator(BITWRIGHT_REFERENCES)) found.push_back(entry.path());
  std::ranges::sort(found);
  return found;
}

TEST(CausalLmReferences, LogitsAreTheRuntimes) {
  size_t cases = 0, refused = 0;
  for (const fs::path& path : references()) {
    SCOPED_TRACE(path.filename().string());
    const Checkpoint checkpoint(path / "model");
    const ModelConfig config = read_model_config(checkpoint.config(), "config.json");
    if (std::ranges::any_of(config.kinds, &LayerKind::experts)) {
      EXPECT_THROW(CausalLm{checkpoint}, Error);
      ++refused;
      continue;
    }
    EXPECT_LE(difference(checkpoint, tokens_of(path)), 1e-3);
    ++cases;
  }
  if (cases == 0) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  std::cout << "cases: " << cases << ", with experts: " << refused << '\n';
}

/// Each matrix of the model by `scheme`, in the native container.
void write_quantized(const fs::path& from, const fs::path& to, const Scheme& scheme) {
  const Checkpoint checkpoint(from);
  test::Tensors tensors;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    const std::vector<float> values = checkpoint.read_f32(entry);
    tensors[entry.name] = encode(entry.shape.size() == 2 ? scheme : plain(DType::f32), entry.shape, values);
  }
  test::write_checkpoint(to, checkpoint.config(), tensors);
}

TEST(CausalLmReferences, QuantizedAsTheRuntimeDecodesIt) {
  const Scheme scheme = {.element = &integer_element(4, true),
                         .scale = parameter(Grouping::along(16), plain(DType::f16))};
  size_t cases = 0;
  for (const char* name : {"gpt2-plain", "phi3-short", "gpt_neox-parallel", "llama-tied"}) {
    const fs::path path = fs::path(BITWRIGHT_REFERENCES) / name;
    if (!fs::exists(path)) continue;
    SCOPED_TRACE(name);
    const test::TemporaryDirectory quantized;
    write_quantized(path / "model", quantized.path(), scheme);
    EXPECT_LE(difference(Checkpoint(quantized.path()), tokens_of(path)), 1e-3);
    ++cases;
  }
  if (cases == 0) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
}

TEST(CausalLm, LogitsOfTheBundledModelAreTheRuntimes) {
  const Checkpoint checkpoint(test::example_model());
  EXPECT_LE(difference(checkpoint, some_tokens(200, 1000)), 1e-3);
}

TEST(CausalLm, LogitsOfSharedModelsAreTheRuntimes) {
  size_t cases = 0;
  const fs::path models = test::shared_dir() / "data/models";
  if (!fs::is_directory(models)) GTEST_SKIP() << "no shared models";
  for (const auto& entry : fs::directory_iterator(models)) {
    if (!fs::exists(entry.path() / "hf/config.json")) continue;
    SCOPED_TRACE(entry.path().string());
    const Checkpoint checkpoint(entry.path() / "hf");
    EXPECT_LE(difference(checkpoint, some_tokens(64, 100)), 1e-3);
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

Json tiny(const std::string& more = "{}") {
  Json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"model_type", "llama"},
                 {"hidden_size", 32},
                 {"intermediate_size", 64},
                 {"num_hidden_layers", 3},
                 {"num_attention_heads", 4},
                 {"num_key_value_heads", 2},
                 {"vocab_size", 96},
                 {"max_position_embeddings", 64}};
  config.update(parse_json(more, "test"));
  return config;
}

TEST(CausalLm, NamesAreTheCheckpoints) {
  const Checkpoint checkpoint(test::example_model());
  const auto loaded = std::make_shared<CausalLm>(checkpoint), made = std::make_shared<CausalLm>(checkpoint.config());
  std::set<std::string> expected, names, made_names;
  for (const TensorEntry& entry : checkpoint.tensors()) expected.insert(entry.name);
  for (const auto& item : loaded->named_parameters()) names.insert(item.key());
  for (const auto& item : made->named_parameters()) made_names.insert(item.key());
  EXPECT_EQ(names, expected);
  EXPECT_EQ(made_names, expected);
  size_t linears = 0;
  for_each_linear(*loaded, [&](const std::string& path, torch::nn::LinearImpl& linear) {
    ++linears;
    EXPECT_EQ(linear.weight.sizes().vec(), checkpoint.find(path + ".weight")->shape);
  });
  EXPECT_EQ(static_cast<int64_t>(linears), 7 * loaded->config().layers + (loaded->tied_head() ? 0 : 1));
}

TEST(CausalLm, RandomWeights) {
  const auto a = std::make_shared<CausalLm>(tiny(), CausalLmOptions{.seed = 5});
  const auto b = std::make_shared<CausalLm>(tiny(), CausalLmOptions{.seed = 5});
  const auto c = std::make_shared<CausalLm>(tiny(), CausalLmOptions{.seed = 6});
  const auto weight = [](const auto& module, const char* name) { return module->named_parameters()[name]; };
  for (const char* name : {"model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"}) {
    EXPECT_TRUE(torch::equal(weight(a, name), weight(b, name)));
    EXPECT_FALSE(torch::equal(weight(a, name), weight(c, name)));
    EXPECT_NEAR(weight(a, name).std().template item<double>(), 0.02, 0.0015) << name;
  }
  for (const char* name : {"model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"})
    EXPECT_NEAR(weight(a, name).std().template item<double>(), 0.02 / std::sqrt(6.0), 0.0008) << name;
  EXPECT_TRUE(torch::equal(weight(a, "model.norm.weight"), torch::ones({32})));
  const Tensor tokens = random_tokens(2, 16, 96);
  EXPECT_NEAR(a->loss(tokens, tokens.roll(-1, 1)).item<double>(), std::log(96.0), 0.1);
}

TEST(CausalLm, LossIsTheMeanOverWhatCounts) {
  for (const char* more : {"{}", R"({"tie_word_embeddings": true})"}) {
    const auto module = std::make_shared<CausalLm>(tiny(more));
    const Tensor tokens = random_tokens(2, 12, 96);
    Tensor targets = tokens.roll(-1, 1);
    targets.select(1, 11).fill_(-1);
    targets[0][3] = -100;
    const Tensor logs = torch::log_softmax(module->forward(tokens), -1);
    const Tensor counts = targets >= 0;
    const Tensor expected =
        -logs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1).masked_select(counts).mean();
    const Tensor loss = module->loss(tokens, targets);
    EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-5);
    loss.backward();
    std::vector<Tensor> gradients;
    for (const Tensor& parameter : module->parameters()) gradients.push_back(parameter.grad().clone());
    module->zero_grad();
    expected.backward();
    for (size_t i = 0; i < gradients.size(); ++i)
      EXPECT_TRUE(torch::allclose(gradients[i], module->parameters()[i].grad(), 1e-3, 1e-6)) << i;
  }
}

TEST(CausalLm, SequencesOfABatchDoNotSeeEachOther) {
  const auto module = std::make_shared<CausalLm>(tiny());
  const torch::NoGradGuard no_gradients;
  const Tensor tokens = random_tokens(3, 20, 96), all = module->forward(tokens);
  for (int64_t i = 0; i < 3; ++i)
    EXPECT_TRUE(torch::allclose(all[i], module->forward(tokens.narrow(0, i, 1))[0], 1e-4, 1e-5));
}

TEST(CausalLm, Bfloat16IsNear) {
  const Checkpoint checkpoint(test::example_model());
  const auto module = std::make_shared<CausalLm>(checkpoint);
  const auto half = std::make_shared<CausalLm>(checkpoint, CausalLmOptions{.matrices = torch::kBFloat16});
  const torch::NoGradGuard no_gradients;
  const Tensor tokens = as_tensor(some_tokens(32, 1000)), exact = module->forward(tokens);
  const auto check = [&](const Tensor& logits) {
    EXPECT_EQ(logits.scalar_type(), torch::kFloat32);
    const double error = (logits - exact).norm().item<double>() / exact.norm().item<double>();
    EXPECT_GT(error, 1e-5);
    EXPECT_LT(error, 0.03);
  };
  module->options().compute = torch::kBFloat16;
  check(module->forward(tokens));
  EXPECT_EQ(half->named_parameters()["model.layers.0.mlp.up_proj.weight"].scalar_type(), torch::kBFloat16);
  check(half->forward(tokens));
}

TEST(CausalLm, BadInputIsRefused) {
  EXPECT_THROW(CausalLm(tiny(R"({"architectures": ["NoSuchModel"]})")), Error);
  EXPECT_THROW(CausalLm(tiny(R"({"hidden_size": -1})")), Error);
  Json config = {{"architectures", {"GPT2LMHeadModel"}},
                 {"n_embd", 16},
                 {"n_layer", 1},
                 {"n_head", 2},
                 {"vocab_size", 20},
                 {"n_positions", 8}};
  const auto module = std::make_shared<CausalLm>(config);
  EXPECT_TRUE(module->stored_transposed("transformer.h.0.attn.c_attn.weight"));
  EXPECT_FALSE(module->stored_transposed("transformer.wte.weight"));
  EXPECT_NO_THROW(module->forward(random_tokens(1, 8, 20)));
  EXPECT_THROW(module->forward(random_tokens(1, 9, 20)), Error);
}

/// A frozen base with an adapter of its own: dropout before two small matrices.
struct Adapter : LinearBehaviour {
  explicit Adapter(const torch::nn::LinearImpl& linear)
      : base(linear.weight.detach()),
        down(torch::randn({4, base.size(1)}).mul_(0.1).requires_grad_()),
        up(torch::randn({base.size(0), 4}).mul_(0.1).requires_grad_()) {}
  Tensor forward(const Tensor& input, const Tensor& bias) override {
    const Tensor dropped = torch::dropout(input, 0.2, true);
    return torch::linear(input, base, bias) + torch::linear(torch::linear(dropped, down), up);
  }
  Tensor base, down, up;
};

/// Those of one pass.
std::vector<Tensor> gradients_of(CausalLm& module, const std::vector<Tensor>& learning, bool recompute) {
  module.options().recompute_layers = recompute;
  for (const Tensor& tensor : learning) tensor.mutable_grad() = Tensor();
  torch::manual_seed(11);
  const Tensor tokens = random_tokens(2, 16, 96);
  module.loss(tokens, tokens.roll(-1, 1)).backward();
  std::vector<Tensor> out = {torch::rand({1})};  // random numbers go on as they would have
  for (const Tensor& tensor : learning) out.push_back(tensor.grad());
  return out;
}

void expect_equal(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_TRUE(a[i].defined() && b[i].defined()) << i;
    EXPECT_TRUE(torch::equal(a[i], b[i])) << i;
  }
}

TEST(CausalLm, RecomputedLayersGiveTheSameGradients) {
  const auto module = std::make_shared<CausalLm>(tiny());
  std::vector<Tensor> learning = module->parameters();
  expect_equal(gradients_of(*module, learning, false), gradients_of(*module, learning, true));
  module->options().compute = torch::kBFloat16;
  expect_equal(gradients_of(*module, learning, false), gradients_of(*module, learning, true));
  module->options().compute = torch::kFloat32;
  // A frozen base: nothing that enters the first layer requires a gradient.
  for (const Tensor& parameter : learning) parameter.set_requires_grad(false);
  learning.clear();
  for_each_linear(*module, [&](const std::string&, torch::nn::LinearImpl& linear) {
    const auto adapter = std::make_shared<Adapter>(linear);
    learning.insert(learning.end(), {adapter->down, adapter->up});
    attach(linear, adapter, adapter->base);
  });
  expect_equal(gradients_of(*module, learning, false), gradients_of(*module, learning, true));
}

/// Counts what libtorch holds.
class Counting : public c10::Allocator {
 public:
  explicit Counting(c10::Allocator& inner) : inner_(inner) {}
  c10::DataPtr allocate(size_t bytes) const override {
    c10::DataPtr data = inner_.allocate(bytes + kHeader);
    auto* const block = static_cast<char*>(data.release_context());
    std::memcpy(block, &bytes, sizeof bytes);
    now += bytes;
    most = std::max(most, now);
    return {block + kHeader, block + kHeader, free, torch::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return free; }
  inline static size_t now = 0, most = 0;
  inline static c10::DeleterFnPtr inner_free = nullptr;

 private:
  static constexpr size_t kHeader = 64;
  static void free(void* data) {
    if (data == nullptr) return;
    char* const block = static_cast<char*>(data) - kHeader;
    size_t bytes = 0;
    std::memcpy(&bytes, block, sizeof bytes);
    now -= bytes;
    inner_free(block);
  }
  c10::Allocator& inner_;
};

TEST(CausalLm, RecomputedLayersTakeLessMemory) {
  const auto module = std::make_shared<CausalLm>(tiny(R"({"num_hidden_layers": 12, "vocab_size": 16})"));
  const Tensor tokens = random_tokens(8, 64, 16);
  module->loss(tokens, tokens).backward();  // gradients exist from here on
  c10::Allocator& usual = *c10::GetCPUAllocator();
  Counting::inner_free = usual.raw_deleter();
  static Counting counting(usual);
  c10::SetCPUAllocator(&counting, /*priority=*/100);
  const auto peak = [&](bool recompute) {
    module->options().recompute_layers = recompute;
    const size_t before = Counting::most = Counting::now;
    module->loss(tokens, tokens).backward();
    EXPECT_EQ(Counting::now, before);
    return static_cast<double>(Counting::most - before);
  };
  const double kept = peak(false), recomputed = peak(true);
  c10::SetCPUAllocator(&usual, /*priority=*/100);
  EXPECT_LT(recomputed, kept / 4) << kept << " and " << recomputed;
}

TEST(CausalLm, LinearLayersCanBeLoadedInAnotherWay) {
  const Checkpoint checkpoint(test::example_model());
  const auto plain_module = std::make_shared<CausalLm>(checkpoint);
  std::set<std::string> asked;
  const LinearLoader load = [&](const std::string& path, torch::nn::LinearImpl& layer, const Checkpoint& from,
                                const TensorEntry& entry, bool transposed) {
    asked.insert(path);
    EXPECT_EQ(layer.weight.sizes().vec(), entry.shape);
    EXPECT_FALSE(transposed);
    if (!path.ends_with("down_proj")) return false;
    const std::vector<float> values = from.read_f32(entry);
    layer.weight = torch::tensor(values).view(entry.shape);
    const auto adapter = std::make_shared<Adapter>(layer);
    adapter->up.detach().zero_();
    attach(layer, adapter, adapter->base);
    return true;
  };
  const auto module = std::make_shared<CausalLm>(checkpoint, CausalLmOptions{.load_linear = load});
  size_t linears = 0;
  for_each_linear(*module, [&](const std::string& path, torch::nn::LinearImpl&) {
    ++linears;
    EXPECT_TRUE(asked.contains(path));
  });
  EXPECT_EQ(asked.size(), linears);
  const torch::NoGradGuard no_gradients;
  const Tensor tokens = as_tensor(some_tokens(16, 1000));
  EXPECT_TRUE(torch::allclose(module->forward(tokens), plain_module->forward(tokens), 1e-4, 1e-4));
}

}  // namespace
}  // namespace bitwright::train
