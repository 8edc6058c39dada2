#include "model/open_model.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "model/gguf_mapping.hpp"
#include "model/model.hpp"
#include "tests/checkpoints.hpp"
#include "tests/gguf_models.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;
using test::TemporaryDirectory;

std::vector<float> logits_of(const Checkpoint& checkpoint, int64_t tokens = 24) {
  const Model model(checkpoint);
  KvCache cache(model.config(), tokens);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(static_cast<int32_t>((5 * i + i * i) % model.config().vocabulary));
  return model.forward(ids, cache);
}

void expect_close(const std::vector<float>& a, const std::vector<float>& b, float most) {
  ASSERT_EQ(a.size(), b.size());
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  EXPECT_LE(worst, most);
}

/// What GGUF has no key for is the same in every model that llama.cpp runs.
bool make_expressible(Json& config) {
  const std::string type = config["model_type"];
  const Json scaling = config.value("rope_scaling", Json()), parameters = config.value("rope_parameters", Json());
  const std::string rope = scaling.is_object() ? scaling.value("rope_type", scaling.value("type", "")) : "";
  if (!parameters.is_null() || rope == "dynamic" || rope == "yarn" || config.contains("layer_types") ||
      config.contains("text_config") || config.value("mlp_only_layers", Json::array()).size() > 0)
    return false;
  if (config.value("use_sliding_window", false)) config["use_sliding_window"] = false;
  if (type == "mistral" || type == "mixtral") config["sliding_window"] = nullptr;
  if (type == "qwen3_moe") config["norm_topk_prob"] = true;
  if (type == "gpt2") config["activation_function"] = "gelu_new";
  if (type == "gemma2" || type == "gemma3_text") config["query_pre_attn_scalar"] = config["head_dim"];
  if (type == "gemma2" && config["attn_logit_softcapping"].is_null()) return false;
  if (type == "gemma3_text") {
    config["rope_local_base_freq"] = 10000;
    config["sliding_window_pattern"] = 6;
  }
  return true;
}

// tools/reference's random models, one and more of each architecture, by way of GGUF.
TEST(ModelReference, GgufOfEveryArchitecture) {
  if (!fs::is_directory(BITWRIGHT_REFERENCES)) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  std::set<const GgufMapping*> covered;  // architectures that GGUF gives one name share it
  size_t cases = 0;
  for (const auto& entry : fs::directory_iterator(BITWRIGHT_REFERENCES)) {
    SCOPED_TRACE(entry.path().filename());
    const TemporaryDirectory dir;
    Json config = parse_json(test::read_file(entry.path() / "model/config.json"), "config");
    if (!make_expressible(config)) continue;
    fs::create_symlink(entry.path() / "model/model.safetensors", dir / "model.safetensors");
    test::write_file(dir / "config.json", config.dump());
    test::write_gguf_model(dir.path(), dir / "model.gguf", "F32");
    const Checkpoint original(dir.path()), converted = open_model(dir / "model.gguf");
    expect_close(logits_of(converted), logits_of(original), 1e-5f);
    covered.insert(find_architecture(config)->gguf);
    ++cases;
  }
  for (const Architecture* row : all_architectures())
    EXPECT_TRUE(row->gguf == nullptr || covered.contains(row->gguf)) << row->name;
  std::cout << "cases: " << cases << '\n';
}

std::vector<fs::path> shared_models() {
  std::vector<fs::path> models;
  for (const char* name : {"stories260K", "babyllama_tok105", "babyllama_tok361", "tinystories4M"})
    if (const fs::path path = test::shared_dir() / "data/models" / name / "hf"; fs::exists(path / "config.json"))
      models.push_back(path);
  return models;
}

TEST(ModelsGguf, FloatsGiveTheSameLogits) {
  if (shared_models().empty()) GTEST_SKIP() << "no models here";
  for (const fs::path& path : shared_models())
    for (const char* type : {"F32", "F16", "BF16"}) {
      SCOPED_TRACE(path.string() + " " + type);
      const TemporaryDirectory dir;
      test::write_gguf_model(path, dir / "model.gguf", type);
      const Checkpoint original(path), converted = open_model(dir / "model.gguf");
      const std::string_view name = type;
      const bool exact = name == "F32" || (name == "BF16" && original.tensors()[0].dtype == DType::bf16);
      const std::vector<float> expected = logits_of(original), logits = logits_of(converted);
      expect_close(logits, expected, exact ? 1e-5f : name == "F16" ? 0.05f : 0.5f);
    }
  std::cout << "cases: " << shared_models().size() << '\n';
}

// The codes of a row are those of the row that it becomes: the model is that of the same scheme in our own container.
TEST(ModelsGguf, QuantizedGivesTheSameLogits) {
  if (shared_models().empty()) GTEST_SKIP() << "no models here";
  const Scheme q8_0 = {.element = &integer_element(8, true),
                       .scale = parameter(Grouping::along(32), plain(DType::f16))};
  for (const fs::path& path : shared_models()) {
    SCOPED_TRACE(path);
    const TemporaryDirectory dir;
    test::write_gguf_model(path, dir / "model.gguf", "Q8_0");
    const Checkpoint original(path), converted = open_model(dir / "model.gguf");
    test::Tensors tensors;
    for (const TensorEntry& entry : original.tensors()) {
      const bool fits = entry.shape.size() == 2 && entry.shape[1] % 32 == 0;
      const std::vector<float> values = original.read_f32(entry);
      tensors[entry.name] = encode(fits ? q8_0 : plain(DType::f32), entry.shape, values);
      const TensorEntry* found = converted.find(entry.name);
      ASSERT_NE(found, nullptr) << entry.name;
      EXPECT_EQ(converted.read(*found), tensors[entry.name]) << entry.name;
    }
    test::write_checkpoint(dir.path(), original.config(), tensors);
    EXPECT_EQ(logits_of(converted), logits_of(Checkpoint(dir.path())));
  }
  std::cout << "cases: " << shared_models().size() << '\n';
}

std::string code_of(const fs::path& path) {
  try {
    const Checkpoint checkpoint = open_model(path);
    const Model model(checkpoint);
  } catch (const Error& error) {
    return error.code();
  }
  return "none";
}

TEST(OpenModel, WhatDoesNotAgreeIsRefused) {
  const TemporaryDirectory dir;
  const auto code = [&](const std::string& architecture, uint32_t heads, const std::string& tensor,
                        const Shape& shape) {
    GgufMetadata metadata;
    metadata.add("general.architecture", architecture);
    metadata.add(architecture + ".attention.head_count", heads);
    metadata.add(architecture + ".expert_count", 0u);
    const ArraySpec spec = {tensor, DType::f32, shape};
    GgufWriter writer(dir / "x.gguf", metadata, {spec});
    writer.add(std::vector<std::byte>(spec.bytes()));
    writer.finish();
    return code_of(dir / "x.gguf");
  };
  EXPECT_EQ(code("unheard-of", 1, "a", {1}), "unknown-architecture");
  EXPECT_EQ(code("llama", 3, "blk.0.attn_q.weight", {8, 4}), "bad-config");
  EXPECT_EQ(code("llama", 0, "blk.0.attn_q.weight", {8, 4}), "bad-config");
  EXPECT_EQ(code("llama", 2, "blk.0.attn_q.weight", {8, 0}), "bad-config");
  EXPECT_EQ(code("gptneox", 2, "blk.0.attn_qkv.weight", {8, 4}), "bad-config");
  EXPECT_EQ(code("llama", 2, "blk.0.attn_q.weight", {8, 4}), "bad-config");  // num_hidden_layers is missing
}

/// A value as GGUF stores it.
struct Raw {
  GgufValueType type;
  bool is_array;
  uint64_t count;
  std::string bytes;
};
template <class T>
Raw raw(GgufValueType type, std::vector<T> values, bool is_array) {
  return {type, is_array, values.size(),
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T))};
}
GgufEntry entry_of(std::string_view key, const Raw& value) {
  return {key, value.type, value.is_array, value.count, std::as_bytes(std::span(value.bytes))};
}

/// A file of one layer of two heads and two experts, with one of its keys replaced.
void write_odd_model(const fs::path& path, const std::string& architecture, bool routed, const std::string& key,
                     const Raw& value) {
  GgufMetadata metadata;
  metadata.add("general.architecture", architecture);
  const std::pair<const char*, uint32_t> usual[] = {
      {"block_count", 1},       {"embedding_length", 8},           {"feed_forward_length", 8},
      {"context_length", 16},   {"attention.head_count", 2},       {"attention.head_count_kv", 2},
      {"expert_used_count", 1}, {"expert_feed_forward_length", 8}, {"expert_count", routed ? 2 : 0}};
  for (const auto& [name, number] : usual)
    if (key != name) metadata.add(architecture + "." + name, number);
  for (const char* name : {"attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"})
    if (key != name) metadata.add(architecture + "." + name, 1e-5F);
  const std::string whole = architecture + "." + key;
  metadata.add(entry_of(whole, value));
  const std::vector<ArraySpec> specs = {
      {"token_embd.weight", DType::f32, {4, 8}},      {"output_norm.weight", DType::f32, {8}},
      {"blk.0.attn_q.weight", DType::f32, {8, 8}},    {"blk.0.attn_k.weight", DType::f32, {8, 8}},
      {"blk.0.attn_qkv.weight", DType::f32, {24, 8}}, {"blk.0.ffn_gate_exps.weight", DType::f32, {2, 8, 8}},
      {"rope_freqs.weight", DType::f32, {2}},         {"rope_factors_long.weight", DType::f32, {2}},
      {"rope_factors_short.weight", DType::f32, {2}}};
  GgufWriter writer(path, metadata, specs);
  for (const ArraySpec& spec : specs) writer.add(std::vector<std::byte>(spec.bytes(), std::byte{0x3f}));
  writer.finish();
}

// Whatever a key says, the file is refused with an Error that names something (its tensors are too few to run).
TEST(OpenModel, OddMetadataIsRefused) {
  const Raw odd[] = {raw<uint32_t>(GgufValueType::u32, {0}, false),
                     raw<uint64_t>(GgufValueType::u64, {uint64_t{1} << 60}, false),
                     raw<int32_t>(GgufValueType::i32, {-1}, false),
                     raw<float>(GgufValueType::f32, {std::nanf("")}, false),
                     {GgufValueType::string, false, 1, std::string("\2\0\0\0\0\0\0\0\xff\xfe", 10)},
                     raw<uint32_t>(GgufValueType::u32, {2, 3}, true)};
  const TemporaryDirectory dir;
  size_t cases = 0;
  for (const Architecture* row : all_architectures()) {
    if (row->gguf == nullptr) continue;
    std::set<std::string> keys = {"expert_count",
                                  "rope.dimension_count",
                                  "rope.scaling.type",
                                  "rope.scaling.factor",
                                  "rope.scale_linear",
                                  "attention.sliding_window_pattern",
                                  "rope.freq_base_swa",
                                  "attention.key_length",
                                  "rope.scaling.original_context_length",
                                  "attention.sliding_window",
                                  "rope.scaling.attn_factor"};
    for (const std::span<const GgufKey> list : {row->gguf->keys, row->gguf->own_keys})
      for (const GgufKey& key : list) keys.emplace(key.gguf);
    for (const std::string& key : keys)
      for (const Raw& value : odd) {
        SCOPED_TRACE(std::string(row->name) + " " + key);
        write_odd_model(dir / "x.gguf", std::string(row->gguf->architecture), row->gguf->routed, key, value);
        EXPECT_NE(code_of(dir / "x.gguf"), "none");
        ++cases;
      }
  }
  std::cout << "cases: " << cases << '\n';
}

Json rope_scaling(const std::vector<std::pair<std::string, Raw>>& keys) {
  const TemporaryDirectory dir;
  GgufMetadata metadata;
  metadata.add("general.architecture", "qwen2");
  for (const auto& [key, value] : keys) metadata.add(entry_of(key, value));
  GgufWriter(dir / "x.gguf", metadata, {}).finish();
  return open_model(dir / "x.gguf").config().value("rope_scaling", Json());
}

// As llama.cpp reads them (src/llama-model.cpp): no type is linear, and there is an older name of the factor.
TEST(OpenModel, RopeScalingWithoutAType) {
  const Raw four = raw<float>(GgufValueType::f32, {4}, false), one = raw<float>(GgufValueType::f32, {1}, false);
  const Raw none = {GgufValueType::string, false, 1, std::string("\4\0\0\0\0\0\0\0none", 12)};
  const Json linear = {{"rope_type", "linear"}, {"factor", 4.0}};
  EXPECT_EQ(rope_scaling({{"qwen2.rope.scaling.factor", four}}), linear);
  EXPECT_EQ(rope_scaling({{"qwen2.rope.scale_linear", four}}), linear);
  EXPECT_EQ(rope_scaling({{"qwen2.rope.scale_linear", one}}), Json());
  EXPECT_EQ(rope_scaling({{"qwen2.rope.scaling.factor", four}, {"qwen2.rope.scaling.type", none}}), Json());
  EXPECT_EQ(rope_scaling({}), Json());
  EXPECT_THROW(rope_scaling({{"qwen2.rope.scaling.factor", four}, {"qwen2.rope.scaling.attn_factor", four}}), Error);
}

// By their keys, and by their text as llama.cpp knows them.
TEST(OpenModel, EveryEndOfATurnIsKnown) {
  const TemporaryDirectory dir;
  const auto ends = [&](const GgufMetadata& more) {
    GgufWriter(dir / "x.gguf", more, {}).finish();
    return open_model(dir / "x.gguf").config().value("eos_token_id", Json());
  };
  GgufMetadata metadata;
  metadata.add("general.architecture", "llama");
  EXPECT_EQ(ends(metadata), Json());
  metadata.add("tokenizer.ggml.eos_token_id", uint32_t{1});
  EXPECT_EQ(ends(metadata), Json(1));
  metadata.add("tokenizer.ggml.eot_token_id", uint32_t{3});
  const std::vector<std::string> tokens = {"a", "</s>", "<|im_end|>", "b"};
  metadata.add("tokenizer.ggml.tokens", std::span<const std::string>(tokens));
  EXPECT_EQ(ends(metadata), Json({1, 3, 2}));
}

// The directory's own files are another model's, but the weights are found there.
TEST(OpenModel, ADirectoryOfOneGgufFile) {
  const TemporaryDirectory dir;
  test::write_gguf_model(test::example_model(), dir / "some name.gguf", "Q8_0");
  const std::vector<float> expected = logits_of(open_model(dir / "some name.gguf"));
  EXPECT_EQ(logits_of(open_model(dir.path())), expected);
  test::write_file(dir / "config.json", R"({"architectures": ["Other"]})");
  EXPECT_EQ(logits_of(open_model(dir.path())), expected);
}

}  // namespace
}  // namespace bitwright
