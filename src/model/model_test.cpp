#include "model/model.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using Tensors = std::map<std::string, QuantizedTensor>;

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

/// A checkpoint, in the native container where tensors are quantized.
void write_checkpoint(const std::filesystem::path& dir, const Json& config, const Tensors& tensors) {
  const Container& native = *find_container("native");
  std::vector<StoredTensor> stored;
  std::vector<NamedArray> arrays;
  for (const auto& [name, t] : tensors) {
    if (t.scheme.is_plain()) {
      arrays.push_back({{name, dtype_of(*t.scheme.element).value(), t.shape}, t.codes});
      continue;
    }
    stored.push_back({.name = name, .shape = t.shape, .scheme = t.scheme});
    for (NamedArray& array : native.pack(stored.back(), t)) arrays.push_back(std::move(array));
  }
  std::vector<ArraySpec> specs;
  for (const NamedArray& array : arrays) specs.push_back(array.spec);
  SafetensorsWriter writer(dir / "model.safetensors", specs);
  for (const NamedArray& array : arrays) writer.add(array.data);
  writer.finish();
  OrderedJson written = config;
  std::map<std::string, OrderedJson> files;
  if (!stored.empty()) native.write_metadata(stored, OrderedJson::object(), {written, files});
  test::write_file(dir / "config.json", written.dump());
  for (const auto& [name, json] : files) test::write_file(dir / name, json.dump());
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
  EXPECT_PRED2(
      starts, refusal([](Json&, Tensors& t) { t["model.layers.0.self_attn.q_proj.bias"] = t.at("model.norm.weight"); }),
      "unsupported-tensor:");
}

}  // namespace
}  // namespace bitwright
