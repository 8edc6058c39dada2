#include "engine/stored.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <iostream>

#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

/// Arrays without data, as a header lists them.
struct Listed {
  std::string name;
  DType dtype;
  Shape shape;
};
StoredWeights read(const std::vector<Listed>& listed, const Json* metadata = nullptr) {
  std::vector<StoredArray> arrays;
  for (const Listed& array : listed) arrays.push_back({array.name, array.dtype, array.shape, {}});
  return read_stored(arrays, metadata);
}
const std::string kUp = "model.layers.0.mlp.up_proj";

TEST(Stored, NamesAloneTellTheMethod) {
  struct Case {
    const char* method;
    double bits;
    int64_t group;
    std::vector<Listed> arrays;
  };
  using enum DType;
  // [14336, 4096] each
  const std::vector<Case> cases = {
      {"gptq",
       4,
       128,
       {{kUp + ".qweight", i32, {512, 14336}},
        {kUp + ".qzeros", i32, {32, 1792}},
        {kUp + ".scales", f16, {32, 14336}},
        {kUp + ".g_idx", i32, {4096}}}},
      {"gptq",
       3,
       128,
       {{kUp + ".qweight", i32, {384, 14336}},
        {kUp + ".qzeros", i32, {32, 1344}},
        {kUp + ".scales", f16, {32, 14336}}}},
      {"gptq",
       8,
       -1,
       {{kUp + ".qweight", i32, {1024, 14336}}, {kUp + ".qzeros", i32, {1, 3584}}, {kUp + ".scales", f16, {1, 14336}}}},
      {"awq",
       4,
       64,
       {{kUp + ".qweight", i32, {4096, 1792}},
        {kUp + ".qzeros", i32, {64, 1792}},
        {kUp + ".scales", f16, {64, 14336}}}},
      {"compressed-tensors",
       4,
       128,
       {{"model.embed_tokens.weight", bf16, {128256, 4096}},
        {kUp + ".weight_packed", i32, {14336, 512}},
        {kUp + ".weight_scale", bf16, {14336, 32}},
        {kUp + ".weight_shape", i64, {2}}}},
      {"compressed-tensors",
       4,
       16,
       {{kUp + ".weight_packed", u8, {14336, 2048}},
        {kUp + ".weight_scale", f8_e4m3, {14336, 256}},
        {kUp + ".weight_global_scale", f32, {1}}}},
      {"compressed-tensors", 8, -1, {{kUp + ".weight", i8, {14336, 4096}}, {kUp + ".weight_scale", f32, {14336, 1}}}},
      {"bitsandbytes", 8, -1, {{kUp + ".weight", i8, {14336, 4096}}, {kUp + ".SCB", f32, {14336}}}},
      {"bitsandbytes",
       4,
       64,
       {{kUp + ".weight", u8, {29360128, 1}},
        {kUp + ".weight.absmax", f32, {917504}},
        {kUp + ".weight.quant_state.bitsandbytes__nf4", u8, {80}}}},
      {"fp8", 8, 128, {{kUp + ".weight", f8_e4m3, {14336, 4096}}, {kUp + ".weight_scale_inv", f32, {112, 32}}}},
      {"fp8",
       8,
       128,
       {{kUp + ".weight", f8_e4m3, {576, 7168}}, {kUp + ".weight_scale_inv", f32, {5, 56}}}},  // 4.5 blocks
      {"fp8", 8, 0, {{kUp + ".weight", f8_e4m3, {14336, 4096}}, {kUp + ".weight_scale", f32, {}}}},
      {"compressed-tensors",
       8,
       -1,
       {{kUp + ".weight", f8_e4m3, {14336, 4096}}, {kUp + ".weight_scale", bf16, {14336, 1}}}},
      {"modelopt",
       4,
       16,
       {{kUp + ".weight", u8, {14336, 2048}},
        {kUp + ".weight_scale", f8_e4m3, {14336, 256}},
        {kUp + ".weight_scale_2", f32, {}}}},
      {"mlx",
       4,
       64,
       {{"model.embed_tokens.weight", bf16, {128256, 4096}},
        {kUp + ".weight", u32, {14336, 512}},
        {kUp + ".scales", bf16, {14336, 64}},
        {kUp + ".biases", bf16, {14336, 64}}}},
      {"hqq", 0, 0, {{kUp + ".W_q", u8, {32, 917504}}, {kUp + ".scale", f16, {1, 917504}}}},  // settings in its data
      {"quanto", 8, 0, {{kUp + ".weight._data", i8, {14336, 4096}}, {kUp + ".weight._scale", bf16, {1}}}},
      {"mxfp4",
       4,
       32,
       {{"model.layers.0.mlp.experts.down_proj_blocks", u8, {32, 2880, 90, 16}},
        {"model.layers.0.mlp.experts.down_proj_scales", u8, {32, 2880, 90}}}},
      {"aqlm", 0, 0, {{kUp + ".codes", i16, {14336, 512, 1}}, {kUp + ".codebooks", f16, {1, 65536, 1, 8}}}},
  };
  for (const Case& c : cases) {
    const StoredWeights stored = read(c.arrays);
    const DetectedQuantization& found = stored.quantization;
    SCOPED_TRACE(c.arrays.back().name);
    EXPECT_EQ(found.method, c.method);
    EXPECT_EQ(found.bits, c.bits);
    EXPECT_EQ(found.group_size, c.group);
    EXPECT_TRUE(found.evidence.starts_with("tensor names: ")) << found.evidence;
    ASSERT_EQ(stored.modules.size(), 1U);
    const bool known = c.bits > 0 && found.method != "bitsandbytes" && found.method != "quanto";
    if (known && found.method != "mxfp4" && stored.modules[0].rows != 576) {
      EXPECT_EQ(stored.modules[0].rows, 14336);
      EXPECT_EQ(stored.modules[0].columns, 4096);
    }
  }
}

TEST(Stored, PlainArraysAreNoMethod) {
  using enum DType;
  const StoredWeights stored = read({{"model.embed_tokens.weight", bf16, {1000, 64}},
                                     {kUp + ".weight", bf16, {256, 64}},
                                     {kUp + ".bias", bf16, {256}},
                                     {"model.layers.0.mlp.gate.weight", f32, {8, 64}},
                                     {"model.norm.weight", bf16, {64}}});
  EXPECT_TRUE(stored.quantization.method.empty());
  ASSERT_EQ(stored.modules.size(), 1U);
  EXPECT_FALSE(stored.modules[0].form.has_value());
  EXPECT_EQ(stored.parameters, 1000 * 64 + 256 * 64 + 8 * 64 + 64);
  // companions that do not fit their codes
  EXPECT_TRUE(read({{kUp + ".qweight", i32, {512, 14336}}}).quantization.method.empty());
  EXPECT_TRUE(
      read({{kUp + ".qweight", i32, {512, 100}}, {kUp + ".qzeros", i32, {32, 7}}, {kUp + ".scales", f16, {32, 64}}})
          .quantization.method.empty());
  EXPECT_TRUE(read({}).quantization.method.empty());
}

TEST(Stored, MostLayersDecide) {
  using enum DType;
  std::vector<Listed> arrays = {{"lm_head.weight", i8, {1000, 64}}, {"lm_head.SCB", f32, {1000}}};
  for (int i = 0; i < 3; ++i) {
    const std::string base = "model.layers." + std::to_string(i) + ".mlp.up_proj";
    arrays.push_back({base + ".weight", f8_e4m3, {256, 256}});
    arrays.push_back({base + ".weight_scale_inv", f32, {2, 2}});
  }
  const StoredWeights stored = read(arrays);
  EXPECT_EQ(stored.quantization.method, "fp8");
  EXPECT_EQ(stored.quantization.scheme, "fp8 block 128x128");
  EXPECT_EQ(stored.modules.size(), 4U);
}

TEST(Stored, WhatTheConfigurationAdds) {
  std::vector<LinearModule> modules = {{"a", 64, 256, WeightForm{.group = 64}},
                                       {"b", 64, 256, WeightForm{.group = -1}}};
  DetectedQuantization declared{.method = "gptq"};
  declared.facts = {{"sym", false}, {"desc_act", true}};
  apply_declared(declared, modules);
  EXPECT_TRUE(modules[0].form->act_order);
  EXPECT_FALSE(modules[1].form->act_order);  // a row is one group: there is no order to keep
  EXPECT_FALSE(modules[1].form->symmetric);
}

/// Models that the owning libraries wrote: their arrays alone say what config.json says as well.
TEST(Stored, ModelsThatOthersWrote) {
  size_t cases = 0;
  std::error_code none;
  for (const auto& folder : fs::directory_iterator(test::shared_dir() / "golden", none)) {
    if (!folder.is_directory()) continue;
    for (const auto& model : fs::directory_iterator(folder.path())) {
      const fs::path weights = model.path() / "model.safetensors", config = model.path() / "config.json";
      if (!fs::is_regular_file(weights) || !fs::is_regular_file(config)) continue;
      const DetectedQuantization declared =
          detect_model_quantization({{"config.json", parse_json(test::read_file(config), config.string())}});
      if (declared.method.empty()) continue;
      SCOPED_TRACE(model.path().string());
      const StoredWeights stored = read_stored(std::vector<fs::path>{weights});
      EXPECT_EQ(stored.quantization.method, declared.method);
      if (declared.bits > 0 && stored.quantization.bits > 0) {
        EXPECT_EQ(stored.quantization.bits, declared.bits);
      }
      if (declared.group_size > 0 && stored.quantization.bits > 0) {
        EXPECT_EQ(stored.quantization.group_size, declared.group_size);
      }
      size_t quantized = 0;
      for (const LinearModule& module : stored.modules) quantized += module.form.has_value() ? 1 : 0;
      EXPECT_GE(quantized, 2U);
      ++cases;
    }
  }
  if (cases == 0) GTEST_SKIP() << "no golden models here";
  std::cout << "cases: " << cases << '\n';
}

Json gguf(const char* text) { return Json::parse(text); }

TEST(Stored, GgufHeaders) {
  const Json metadata = gguf(R"({"general.architecture": "llama", "general.file_type": 15, "llama.block_count": 32,
    "llama.embedding_length": 4096, "llama.feed_forward_length": 14336, "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8, "llama.context_length": 131072, "tokenizer.ggml.tokens": ["a", "b", "c"]})");
  const BlockType q4k = {"Q4_K", 256, 144}, q6k = {"Q6_K", 256, 210};
  const std::vector<StoredArray> arrays = {
      {"blk.0.ffn_up.weight", DType::u8, {14336, 4096}, {}, &q4k},
      {"blk.0.ffn_down.weight", DType::u8, {4096, 14336}, {}, &q6k},
      {"blk.0.attn_norm.weight", DType::f32, {4096}, {}},
  };
  const StoredWeights stored = read_stored(arrays, &metadata);
  EXPECT_EQ(stored.quantization.method, "gguf");
  EXPECT_EQ(stored.quantization.scheme, "Q4_K_M");
  EXPECT_DOUBLE_EQ(stored.quantization.bits, (4.5 + 6.5625) / 2);
  EXPECT_EQ(stored.parameters, 2.0 * 14336 * 4096 + 4096);
  EXPECT_EQ(stored.model["layers"], 32);
  EXPECT_EQ(stored.model["kv_heads"], 8);
  EXPECT_EQ(stored.model["head_dim"], 128);
  EXPECT_EQ(stored.model["context"], 131072);
  EXPECT_EQ(stored.model["vocabulary"], 3);
  EXPECT_EQ(stored.model["moe"], false);
}

TEST(Stored, GgufOfExpertsLatentsAndLayersThatDiffer) {
  const Json moe = gguf(R"({"general.architecture": "deepseek2", "deepseek2.block_count": 61,
    "deepseek2.embedding_length": 7168, "deepseek2.attention.head_count": 128, "deepseek2.attention.kv_lora_rank": 512,
    "deepseek2.rope.dimension_count": 64, "deepseek2.expert_count": 256, "deepseek2.leading_dense_block_count": 3})");
  const Json facts = gguf_model_facts(moe);
  EXPECT_EQ(facts["mla"], true);
  EXPECT_EQ(facts["moe"], true);
  EXPECT_EQ(facts["qk_rope_head_dim"], 64);
  EXPECT_EQ(facts["dense_layers"], 3);
  const Json gemma = gguf_model_facts(gguf(R"({"general.architecture": "gemma3", "gemma3.attention.head_count_kv":
    [4, 0, 4], "gemma3.attention.sliding_window": 1024, "gemma3.attention.sliding_window_pattern": [true, true, false]})"));
  EXPECT_EQ(gemma["kv_heads"], 4);
  EXPECT_EQ(gemma["linear_layers"], 1);
  EXPECT_EQ(gemma["sliding_layers"], 2);
  EXPECT_TRUE(gguf_model_facts(gguf("{}")).empty());
  EXPECT_FALSE(gguf_model_facts(gguf(R"({"general.architecture": "x", "x.block_count": "many"})")).contains("layers"));
  // without a type the one of most weights stands for the file
  const BlockType q8 = {"Q8_0", 32, 34};
  const std::vector<StoredArray> arrays = {{"blk.0.ffn_up.weight", DType::u8, {64, 64}, {}, &q8}};
  const Json nothing = Json::object();
  EXPECT_EQ(read_stored(arrays, &nothing).quantization.scheme, "Q8_0");
}

}  // namespace
}  // namespace bitwright
