#include "model/model.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "model/open_model.hpp"
#include "tests/checkpoints.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::Tensors;
using test::write_checkpoint;

/// Sizes that are no multiples of anything.
Json tiny_config(bool tied) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 36},
          {"intermediate_size", 50},
          {"num_hidden_layers", 2},
          {"vocab_size", 41},
          {"num_attention_heads", 6},
          {"num_key_value_heads", 2},
          {"head_dim", 10},
          {"max_position_embeddings", 64},
          {"tie_word_embeddings", tied}};
}

QuantizedTensor random_tensor(std::mt19937& random, const Shape& shape, float mean, const Scheme& scheme) {
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& v : values) v = mean + static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 4000;
  return encode(scheme, shape, values);
}

/// Random weights; norms are f32, matrices are stored by `scheme`.
Tensors tiny_model(const Json& config, const Scheme& scheme) {
  std::mt19937 random(1);
  Tensors tensors;
  const auto dimension = [&](const char* key) { return config.at(key).get<int64_t>(); };
  const int64_t hidden = dimension("hidden_size"), feed_forward = dimension("intermediate_size");
  const int64_t q = dimension("num_attention_heads") * dimension("head_dim");
  const int64_t kv = dimension("num_key_value_heads") * dimension("head_dim");
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns) {
    tensors[name + ".weight"] = random_tensor(random, {rows, columns}, 0, scheme);
  };
  const auto norm = [&](const std::string& name) {
    tensors[name + ".weight"] = random_tensor(random, {hidden}, 1, plain(DType::f32));
  };
  matrix("model.embed_tokens", dimension("vocab_size"), hidden);
  if (!config.at("tie_word_embeddings").get<bool>()) matrix("lm_head", dimension("vocab_size"), hidden);
  norm("model.norm");
  for (int64_t i = 0; i < dimension("num_hidden_layers"); ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + '.';
    norm(layer + "input_layernorm");
    norm(layer + "post_attention_layernorm");
    matrix(layer + "self_attn.q_proj", q, hidden);
    matrix(layer + "self_attn.k_proj", kv, hidden);
    matrix(layer + "self_attn.v_proj", kv, hidden);
    matrix(layer + "self_attn.o_proj", hidden, q);
    matrix(layer + "mlp.gate_proj", feed_forward, hidden);
    matrix(layer + "mlp.up_proj", feed_forward, hidden);
    matrix(layer + "mlp.down_proj", hidden, feed_forward);
  }
  return tensors;
}

constexpr int32_t kPrompt[] = {1, 40, 7, 7, 0, 23, 12, 5, 39, 2, 3, 11, 29, 8, 31, 17, 6, 13, 20};

std::vector<float> logits_of(const std::filesystem::path& dir) {
  const Checkpoint checkpoint(dir);
  const Model model(checkpoint);
  KvCache cache(model.config(), 64);
  return model.forward(kPrompt, cache);
}

std::vector<Scheme> matrix_schemes() {
  const auto along = [](int64_t size, DType dtype) { return parameter(Grouping::along(size), plain(dtype)); };
  const ElementType* const uint4 = &integer_element(4, false);
  return {plain(DType::f32),
          plain(DType::f16),
          plain(DType::bf16),
          {.element = &integer_element(8, true), .scale = along(0, DType::f32)},
          {.element = &integer_element(4, true), .scale = along(16, DType::f16)},
          {.element = uint4,
           .scale = along(32, DType::bf16),
           .offset_kind = OffsetKind::zero_point,
           .offset = parameter(Grouping::along(32), {.element = uint4})},
          {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))}};
}

TEST(Model, QuantizedIsTheModelOfTheDecodedWeights) {
  for (const Scheme& scheme : matrix_schemes())
    for (const bool tied : {false, true}) {
      SCOPED_TRACE(describe(scheme));
      const Json config = tiny_config(tied);
      Tensors tensors = tiny_model(config, scheme);
      const test::TemporaryDirectory quantized, floats;
      write_checkpoint(quantized.path(), config, tensors);
      for (auto& [name, t] : tensors) {
        const std::vector<float> values = decode(t);
        const auto bytes = std::as_bytes(std::span(values));
        t = {.scheme = plain(DType::f32), .shape = t.shape, .codes = {bytes.begin(), bytes.end()}};
      }
      write_checkpoint(floats.path(), config, tensors);
      const std::vector<float> logits = logits_of(floats.path());
      EXPECT_TRUE(std::isfinite(logits.back()));
      EXPECT_EQ(logits_of(quantized.path()), logits);
    }
}

class ModelTiny : public testing::Test {
 protected:
  ModelTiny() { write_checkpoint(directory_.path(), config_, tiny_model(config_, plain(DType::bf16))); }
  const Json config_ = tiny_config(false);
  const test::TemporaryDirectory directory_;
};

TEST_F(ModelTiny, PiecesGiveTheSameBits) {
  const Checkpoint checkpoint(directory_.path());
  const Model model(checkpoint);
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 600; ++i) tokens.push_back(i * 7 % 41);
  KvCache whole(model.config(), 600), pieces(model.config(), 600);
  const std::vector<float> all = model.forward(tokens, whole);
  std::vector<float> joined;
  for (size_t begin = 0, step = 1; begin < tokens.size(); begin += step, step = step * 3 % 97) {
    const auto piece = std::span(tokens).subspan(begin, std::min(step, tokens.size() - begin));
    const std::vector<float> logits = model.forward(piece, pieces);
    joined.insert(joined.end(), logits.begin(), logits.end());
  }
  EXPECT_EQ(whole.length(), 600);
  EXPECT_EQ(joined, all);
  whole.clear();
  const std::vector<float> last = model.forward(tokens, whole, Model::Logits::last);
  EXPECT_EQ(last, std::vector<float>(all.end() - 41, all.end()));
}

TEST_F(ModelTiny, ThreadsGiveTheSameBits) {
  const size_t before = thread_count();
  set_thread_count(1);
  const std::vector<float> alone = logits_of(directory_.path());
  set_thread_count(2);
  EXPECT_EQ(logits_of(directory_.path()), alone);
  set_thread_count(before);
}

TEST_F(ModelTiny, FullContext) {
  const Checkpoint checkpoint(directory_.path());
  const Model model(checkpoint);
  KvCache cache(model.config(), 20);
  model.forward(kPrompt, cache);
  EXPECT_EQ(cache.capacity(), 20);
  EXPECT_TRUE(model.forward({}, cache).empty());
  try {
    model.forward(kPrompt, cache);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), "context-full");
  }
  EXPECT_EQ(cache.length(), 19);
}

/// What loading says of a model that `change` has spoilt.
template <class Change>
std::string refusal(Change change) {
  const test::TemporaryDirectory directory;
  Json config = tiny_config(false);
  Tensors tensors = tiny_model(config, plain(DType::f32));
  change(config, tensors);
  write_checkpoint(directory.path(), config, tensors);
  try {
    logits_of(directory.path());
  } catch (const Error& e) {
    return e.code() + ": " + e.what();
  }
  return "accepted";
}

TEST(Model, Refusals) {
  const auto starts = [](const std::string& text, const char* code) { return text.starts_with(code); };
  EXPECT_PRED2(starts, refusal([](Json& c, Tensors&) { c["architectures"] = {"MambaForCausalLM"}; }),
               "unknown-architecture:");
  EXPECT_PRED2(starts, refusal([](Json& c, Tensors&) { c["sliding_window"] = 8; }), "unsupported-config:");
  EXPECT_PRED2(starts, refusal([](Json&, Tensors& t) { t.erase("model.norm.weight"); }), "missing-tensor:");
  EXPECT_PRED2(starts, refusal([](Json&, Tensors& t) { t.erase("model.layers.1.mlp.up_proj.weight"); }),
               "missing-tensor:");
  EXPECT_PRED2(starts, refusal([](Json&, Tensors& t) { t.erase("lm_head.weight"); }), "missing-tensor:");
  EXPECT_PRED2(starts, refusal([](Json& c, Tensors&) { c["intermediate_size"] = 51; }), "wrong-shape:");
  EXPECT_PRED2(starts, refusal([](Json& c, Tensors&) { c["vocab_size"] = 42; }), "wrong-shape:");
  EXPECT_PRED2(starts, refusal([](Json&, Tensors& t) { t.erase("model.embed_tokens.weight"); }), "missing-tensor:");
  EXPECT_PRED2(starts, refusal([](Json&, Tensors& t) { t["draft.embed_tokens.weight"] = t.at("lm_head.weight"); }),
               "ambiguous-tensor:");
  EXPECT_PRED2(starts,
               refusal([](Json&, Tensors& t) { t["model.layers.2.mlp.up_proj.weight"] = t.at("lm_head.weight"); }),
               "unsupported-tensor:");
  EXPECT_PRED2(
      starts, refusal([](Json&, Tensors& t) { t["model.layers.0.self_attn.q_proj.bias"] = t.at("model.norm.weight"); }),
      "unsupported-tensor:");
}

constexpr int64_t kRank = 3;
constexpr double kAlpha = 5;

/// PEFT's files for matrices of tiny_model(): "model.layers.0.mlp.up_proj" and so on.
Tensors adapter_of(const Tensors& model, std::initializer_list<const char*> modules) {
  std::mt19937 random(3);
  Tensors factors;
  for (const std::string module : modules) {
    const Shape& shape = model.at(module + ".weight").shape;
    const std::string key = "base_model.model." + module;
    factors[key + ".lora_A.weight"] = random_tensor(random, {kRank, shape[1]}, 0, plain(DType::f32));
    factors[key + ".lora_B.weight"] = random_tensor(random, {shape[0], kRank}, 0, plain(DType::f32));
  }
  return factors;
}

void write_adapter(const std::filesystem::path& directory, const std::filesystem::path& base, const Tensors& factors) {
  write_checkpoint(directory, Json::object(), factors);
  std::filesystem::remove(directory / "config.json");
  std::filesystem::rename(directory / "model.safetensors", directory / "adapter_model.safetensors");
  const Json config = {{"peft_type", "LORA"},
                       {"r", kRank},
                       {"lora_alpha", kAlpha},
                       {"target_modules", "all-linear"},
                       {"base_model_name_or_path", base.string()}};
  write_text_file(directory / "adapter_config.json", config.dump());
}

std::vector<float> adapted_logits_of(const std::filesystem::path& directory) {
  const RunnableModel opened(directory);
  const Model model(opened.checkpoint, opened.adapter_or_null());
  KvCache cache(model.config(), 64);
  return model.forward(kPrompt, cache);
}

TEST_F(ModelTiny, AnAdapterIsTheModelThatItIsMergedInto) {
  const auto modules = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"};
  Tensors tensors = tiny_model(config_, plain(DType::bf16));
  const Tensors factors = adapter_of(tensors, modules);
  const test::TemporaryDirectory adapter, merged;
  write_adapter(adapter.path(), directory_.path(), factors);
  for (const std::string module : modules) {
    QuantizedTensor& weight = tensors.at(module + ".weight");
    std::vector<float> values = decode(weight);
    const std::vector<float> a = decode(factors.at("base_model.model." + module + ".lora_A.weight"));
    const std::vector<float> b = decode(factors.at("base_model.model." + module + ".lora_B.weight"));
    const auto columns = static_cast<size_t>(weight.shape[1]), rank = static_cast<size_t>(kRank);
    for (size_t i = 0; i < values.size(); ++i)
      for (size_t k = 0; k < rank; ++k)
        values[i] += static_cast<float>(kAlpha / kRank) * b[i / columns * rank + k] * a[k * columns + i % columns];
    weight = encode(plain(DType::f32), weight.shape, values);
  }
  write_checkpoint(merged.path(), config_, tensors);
  const std::vector<float> expected = logits_of(merged.path()), logits = adapted_logits_of(adapter.path());
  const std::vector<float> base = logits_of(directory_.path());
  ASSERT_EQ(logits.size(), expected.size());
  float moved = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    EXPECT_NEAR(logits[i], expected[i], 1e-4);
    moved = std::max(moved, std::abs(base[i] - expected[i]));
  }
  EXPECT_GT(moved, 0.1);
}

TEST_F(ModelTiny, AdaptersThatDoNotBelong) {
  const Tensors tensors = tiny_model(config_, plain(DType::f32));
  const auto refusal_of = [&](const Tensors& factors, const std::filesystem::path& base) {
    const test::TemporaryDirectory adapter;
    write_adapter(adapter.path(), base, factors);
    EXPECT_THROW(open_model(adapter.path()), Error);  // where weights alone are wanted
    try {
      adapted_logits_of(adapter.path());
    } catch (const Error& e) {
      return e.code();
    }
    return std::string("accepted");
  };
  const Tensors fitting = adapter_of(tensors, {"model.layers.1.mlp.up_proj"});
  EXPECT_EQ(refusal_of(fitting, directory_.path()), "accepted");
  EXPECT_EQ(refusal_of(fitting, directory_.path() / "gone"), "no-base");
  EXPECT_EQ(refusal_of({}, directory_.path()), "bad-adapter");
  Tensors changed = fitting;
  changed["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = fitting.begin()->second;
  EXPECT_EQ(refusal_of(changed, directory_.path()), "bad-adapter");  // no lora_B
  changed["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = std::next(fitting.begin())->second;
  EXPECT_EQ(refusal_of(changed, directory_.path()), "bad-adapter");  // no such layer
  changed = fitting;
  changed["other.weight"] = fitting.begin()->second;
  EXPECT_EQ(refusal_of(changed, directory_.path()), "bad-adapter");
  changed = fitting;
  std::swap(changed.begin()->second, std::next(changed.begin())->second);
  EXPECT_EQ(refusal_of(changed, directory_.path()), "bad-adapter");  // B for A
  const Tensors other = adapter_of(tensors, {"model.layers.1.mlp.down_proj"});
  changed = fitting;
  changed["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] =
      other.at("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight");
  EXPECT_EQ(refusal_of(changed, directory_.path()), "bad-adapter");  // another layer's
}

}  // namespace
}  // namespace bitwright
