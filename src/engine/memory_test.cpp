#include "engine/memory.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <iostream>

#include "engine/detect.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

constexpr double kGib = 1024.0 * 1024 * 1024;

Json facts_of(const char* config) { return model_facts(Json::parse(config)); }
const char* const kLlama3 = R"({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
  "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
  "max_position_embeddings": 8192, "tie_word_embeddings": false, "torch_dtype": "bfloat16"})";
const char* const kMistral = R"({"model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096,
  "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000,
  "sliding_window": 4096, "max_position_embeddings": 32768, "tie_word_embeddings": false})";
const char* const kGemma2 = R"({"model_type": "gemma2", "num_hidden_layers": 42, "hidden_size": 3584, "head_dim": 256,
  "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 256000,
  "sliding_window": 4096, "max_position_embeddings": 8192})";
const char* const kGemma3 = R"({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
  "num_hidden_layers": 62, "hidden_size": 5376, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 16,
  "intermediate_size": 21504, "vocab_size": 262208, "sliding_window": 1024, "sliding_window_pattern": 6,
  "max_position_embeddings": 131072}})";
const char* const kDeepSeek = R"({"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168,
  "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
  "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
  "first_k_dense_replace": 3, "vocab_size": 129280, "max_position_embeddings": 163840, "tie_word_embeddings": false})";
const char* const kQwen3Moe = R"({"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048,
  "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
  "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
  "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960, "sliding_window": null,
  "use_sliding_window": false, "tie_word_embeddings": false})";

EnginePlan plan_for(const char* engine, std::vector<std::pair<std::string, Json>> parameters = {}) {
  return plan_engine(
      {.engine = engine, .hardware = {{"vendor", "nvidia"}, {"sm", 90}}, .parameters = std::move(parameters)});
}
MemoryEstimate estimate(const char* config, const Deployment& deployment, const char* engine = "transformers",
                        double bytes = 1e9) {
  return estimate_memory(facts_of(config), bytes, plan_for(engine), deployment);
}

// Every figure below is worked out by hand from the paper's or config.json's sizes.

TEST(MemoryByHand, KeysAndValuesOfATokenInSixteenBits) {
  EXPECT_EQ(estimate(kLlama3, {.context = 1}).kv_bytes_per_token, 2 * 32 * 8 * 128 * 2.0);    // 128 KiB
  EXPECT_EQ(estimate(kMistral, {.context = 1}).kv_bytes_per_token, 131072.0);                 // the same sizes
  EXPECT_EQ(estimate(kGemma2, {.context = 1}).kv_bytes_per_token, 2 * 42 * 8 * 256 * 2.0);    // 344064
  EXPECT_EQ(estimate(kDeepSeek, {.context = 1}).kv_bytes_per_token, 61 * (512 + 64) * 2.0);   // 70272: no heads
  EXPECT_EQ(estimate(kQwen3Moe, {.context = 1}).kv_bytes_per_token, 2 * 48 * 4 * 128 * 2.0);  // 96 KiB
}

TEST(MemoryByHand, Windows) {
  // Mistral: every layer sees 4096 tokens
  EXPECT_EQ(estimate(kMistral, {.context = 32768}).kv_cache_bytes, 4096 * 131072.0);
  EXPECT_EQ(estimate(kMistral, {.context = 1000}).kv_cache_bytes, 1000 * 131072.0);
  // an engine that keeps what the window has left
  EXPECT_EQ(estimate(kMistral, {.context = 32768}, "lmdeploy").kv_cache_bytes, 32768 * 131072.0);
  // Gemma 2: 21 layers of 42 see 4096, 21 all of it; 8192 bytes a layer and token
  EXPECT_EQ(estimate(kGemma2, {.context = 8192}).kv_cache_bytes, 8192.0 * 21 * (4096 + 8192));
  // Gemma 3: each sixth layer sees all: 10 of 62, 52 see 1024
  EXPECT_EQ(facts_of(kGemma3)["sliding_layers"], 52);
  EXPECT_EQ(estimate(kGemma3, {.context = 131072}).kv_cache_bytes, 2 * 16 * 128 * 2.0 * (52 * 1024.0 + 10 * 131072.0));
  // Qwen: the window is there and not used, or used from a layer on
  Json qwen =
      Json::parse(R"({"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads":
    28, "num_key_value_heads": 4, "sliding_window": 4096, "max_window_layers": 21, "use_sliding_window": false})");
  EXPECT_FALSE(model_facts(qwen).contains("sliding_layers"));
  qwen["use_sliding_window"] = true;
  EXPECT_EQ(model_facts(qwen)["sliding_layers"], 7);
  // listed one by one
  const Json listed = facts_of(R"({"num_hidden_layers": 3, "sliding_window": 128, "layer_types":
    ["sliding_attention", "full_attention", "sliding_attention"]})");
  EXPECT_EQ(listed["sliding_layers"], 2);
  const Json chunked = facts_of(R"({"num_hidden_layers": 4, "attention_chunk_size": 8192, "layer_types":
    ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"]})");
  EXPECT_EQ(chunked["sliding_layers"], 3);
  EXPECT_EQ(chunked["sliding_window"], 8192);
}

TEST(MemoryByHand, LayersThatKeepAState) {
  // Qwen3.5-27B's: 48 of 64 layers are Gated DeltaNets, 48 heads of 128 x 128, 16 heads of keys
  const char* const config = R"({"model_type": "qwen3_5_text", "num_hidden_layers": 64, "hidden_size": 5120,
    "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "full_attention_interval": 4,
    "linear_num_value_heads": 48, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "vocab_size": 248320, "intermediate_size": 17408, "attn_output_gate": true})";
  const Json facts = facts_of(config);
  EXPECT_EQ(facts["linear_layers"], 48);
  const double state = 48.0 * (48 * 128 * 128 * 4 + (2 * 16 * 128 + 48 * 128) * 3 * 2);
  EXPECT_EQ(linear_state_bytes(facts), state);
  const double token = 2 * 16 * 4 * 256 * 2.0;  // 16 layers with a cache
  EXPECT_EQ(estimate(config, {.context = 1000, .batch = 3}).kv_cache_bytes, 3 * (1000 * token + state));
  EXPECT_EQ(estimate(config, {.context = 1000, .batch = 3}).kv_bytes_per_token, token);
  const Json nemotron = facts_of(R"({"num_hidden_layers": 8, "hybrid_override_pattern": "M-M*-M-M"})");
  EXPECT_EQ(nemotron["linear_layers"], 7);  // all but one have no cache
}

TEST(MemoryByHand, TensorParallelismCutsHeadsAndRepeatsThem) {
  const double all = 8192 * 131072.0;
  for (const auto& [parts, share] : std::map<int64_t, double>{{1, 1}, {2, 2}, {8, 8}, {16, 8}, {32, 8}})
    EXPECT_EQ(estimate(kLlama3, {.context = 8192, .tensor_parallel = parts}).kv_cache_bytes, all / share) << parts;
  // 5 heads on 2 devices: 3 on one of them
  Json five = facts_of(kLlama3);
  five["kv_heads"] = 5;
  EXPECT_EQ(kv_cache_elements(five, 10, 2), 2 * 32 * 3 * 128 * 10.0);
  // a latent vector is whole on every device
  EXPECT_EQ(estimate(kDeepSeek, {.context = 100, .tensor_parallel = 8}).kv_cache_bytes, 100 * 70272.0);
  EXPECT_EQ(estimate(kLlama3, {.tensor_parallel = 4}, "transformers", 16e9).weights_bytes, 4e9);
}

TEST(MemoryByHand, PipelinesShareLayers) {
  const MemoryEstimate two = estimate(kLlama3, {.context = 8192, .pipeline_parallel = 2}, "transformers", 16.06e9);
  EXPECT_EQ(two.kv_cache_bytes, 8192 * 131072.0 / 2);
  const double table = 2.0 * 128256 * 4096;  // the first has the embeddings, the last the head
  EXPECT_DOUBLE_EQ(two.weights_bytes, (16.06e9 - 2 * table) / 2 + table);
  // 61 layers in 4: 16 on the largest
  EXPECT_DOUBLE_EQ(estimate(kDeepSeek, {.context = 100, .pipeline_parallel = 4}).kv_cache_bytes,
                   100 * 70272.0 * 16 / 61);
}

TEST(MemoryByHand, WhatEnginesKeepForThemselves) {
  const Deployment one = {.context = 8192, .memory_bytes = 80 * kGib};
  const double weights = 16.06e9;
  const MemoryEstimate vllm = estimate(kLlama3, one, "vllm", weights);
  EXPECT_DOUBLE_EQ(vllm.usable_bytes, 80 * kGib * 0.92);
  // 8192 tokens x 2 bytes x (4 x 4096 + 2 x 14336), 1024 rows of logits; measured: 1.26 GiB (vllm-project/vllm#10511)
  EXPECT_DOUBLE_EQ(vllm.activation_bytes, 2.0 * 8192 * (4 * 4096 + 2 * 14336) + 4.0 * 128256 * 1024);
  EXPECT_NEAR(vllm.activation_bytes / kGib, 1.26, 0.1);
  EXPECT_DOUBLE_EQ(vllm.kv_room_bytes, vllm.usable_bytes - weights - vllm.activation_bytes - 0.7 * kGib);
  const MemoryEstimate half =
      estimate_memory(facts_of(kLlama3), weights, plan_for("vllm", {{"gpu-memory-utilization", "0.5"}}), one);
  EXPECT_DOUBLE_EQ(half.usable_bytes, 40 * kGib);
  EXPECT_DOUBLE_EQ(estimate(kLlama3, one, "sglang", weights).kv_room_bytes, (80 - 13.5) * kGib - weights);
  const MemoryEstimate lmdeploy = estimate(kLlama3, one, "lmdeploy", weights);
  EXPECT_DOUBLE_EQ(lmdeploy.kv_room_bytes,
                   0.8 * (80 * kGib - weights - lmdeploy.activation_bytes - lmdeploy.overhead_bytes));
  const MemoryEstimate trt = estimate(kLlama3, one, "tensorrt-llm", weights);
  EXPECT_DOUBLE_EQ(trt.kv_room_bytes, 0.9 * (80 * kGib - weights - trt.activation_bytes - trt.overhead_bytes));
  // llama.cpp's compute buffer for this model: 258.5 MiB of logits and a little
  EXPECT_NEAR(estimate(kLlama3, one, "llamacpp", weights).activation_bytes / (1 << 20), 290, 20);
}

TEST(MemoryByHand, TheMostThatFitsIsTheMost) {
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm", "lmdeploy", "llamacpp", "transformers", "native"})
    for (const char* config : {kLlama3, kGemma2, kDeepSeek, kQwen3Moe}) {
      const Json facts = facts_of(config);
      const Deployment asked = {.context = 4096, .batch = 2, .memory_bytes = 24e9};
      const MemoryEstimate e = estimate(config, asked, engine, 12e9);
      ASSERT_TRUE(e.fits && e.most_batch && e.most_context);
      Deployment most = asked;
      most.batch = *e.most_batch;
      const auto cache = [&](const Deployment& d) { return estimate(config, d, engine, 12e9).kv_cache_bytes; };
      if (most.batch > 0) {
        EXPECT_LE(cache(most), e.kv_room_bytes) << engine;
      }
      ++most.batch;
      EXPECT_GT(cache(most), e.kv_room_bytes) << engine;
      most = asked;
      most.context = *e.most_context + 1;
      EXPECT_TRUE(cache(most) > e.kv_room_bytes || *e.most_context == facts["context"]) << engine;
    }
}

TEST(MemoryByHand, ParametersOfKnownModels) {
  const auto billions = [](const char* config) { return parameters_of(facts_of(config)) / 1e9; };
  EXPECT_NEAR(billions(kLlama3), 8.030, 0.01);    // model cards: 8,030,261,248
  EXPECT_NEAR(billions(kMistral), 7.242, 0.01);   // 7,241,732,096
  EXPECT_NEAR(billions(kGemma2), 9.24, 0.02);     // 9,241,705,984
  EXPECT_NEAR(billions(kGemma3), 27.0, 0.1);      // 27.0 without the eyes
  EXPECT_NEAR(billions(kDeepSeek), 671.0, 1);     // 671,026,419,200
  EXPECT_NEAR(billions(kQwen3Moe), 30.53, 0.05);  // 30,532,122,624
  EXPECT_NEAR(billions(R"({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257,
    "n_positions": 1024})"),
              0.1244, 0.0005);  // 124,439,808
  EXPECT_NEAR(
      billions(R"({"model_type": "gpt_neox", "num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads":
    64, "intermediate_size": 24576, "vocab_size": 50432, "tie_word_embeddings": false})"),
      20.55, 0.1);  // 20,554,567,680
}

TEST(MemoryByHand, MethodsOfExpertsLeaveTheOtherLayers) {
  // DeepSeek-V3: 58 layers of 256 experts of 3 x 7168 x 2048, 654 of 671 billion parameters; two tables of 0.93
  const Json model = {{"moe", true},
                      {"layers", 61},
                      {"hidden_size", 7168},
                      {"vocabulary", 129280},
                      {"dense_layers", 3},
                      {"experts", 256},
                      {"heads", 128},
                      {"head_dim", 56},
                      {"kv_heads", 128},
                      {"context", 4096},
                      {"intermediate_size", 18432},
                      {"moe_intermediate_size", 2048}};
  const double stored = 2 * 671e9, experts = 2.0 * 58 * 256 * 3 * 7168 * 2048, ends = 2.0 * 2 * 129280 * 7168;
  const auto weights = [&](const char* method, const Json& config) {
    PlanRequest request{.engine = "vllm", .model = model, .parameters = {{"quantization", method}}};
    if (!config.is_null()) request.parameters.emplace_back("quantization-config", config);
    return estimate_memory(model, stored, plan_engine(request), {}).weights_bytes;
  };
  EXPECT_DOUBLE_EQ(weights("fp8_per_tensor", {}), ends + (stored - ends) / 2);
  for (const char* method : {"int8_per_channel_weight_only", "experts_int8"})
    EXPECT_DOUBLE_EQ(weights(method, {}), stored - experts / 2) << method;
  EXPECT_DOUBLE_EQ(weights("online", {{"moe", "mxfp4"}}), stored - experts * (1 - 4.25 / 16));
  const double both = ends + (stored - ends - experts) / 2 + experts * 4.25 / 16;
  const Json config = {{"linear", "fp8_per_tensor"}, {"moe", "mxfp4"}};
  EXPECT_DOUBLE_EQ(weights("online", config), both);
  EXPECT_DOUBLE_EQ(weights("online", config.dump()), both);  // as it is typed
}

/// Experts may be made smaller than the rest while loading; embeddings and head never are.
TEST(MemoryByHand, ExpertsAtLoad) {
  const Json facts = facts_of(kQwen3Moe);
  const double all = 2 * parameters_of(facts);
  const double experts = 2 * 48.0 * 128 * 3 * 2048 * 768, tables = 2 * 2 * 151936.0 * 2048;
  const auto weights = [&](std::vector<std::pair<std::string, Json>> parameters) {
    return estimate_memory(facts, 0, plan_for("vllm", std::move(parameters)), {}).weights_bytes;
  };
  EXPECT_DOUBLE_EQ(weights({}), all);
  EXPECT_DOUBLE_EQ(weights({{"quantization", "online"}, {"quantization-config", R"({"moe": "mxfp4"})"}}),
                   all - experts * (1 - 4.25 / 16));
  EXPECT_DOUBLE_EQ(weights({{"quantization", "online"}, {"quantization-config", R"({"linear": "fp8_per_tensor"})"}}),
                   experts + tables + (all - experts - tables) / 2);
  EXPECT_DOUBLE_EQ(weights({{"quantization", "int8_per_channel_weight_only"}}), all - experts / 2);
  EXPECT_DOUBLE_EQ(weights({{"quantization", "fp8"}}), tables + (all - tables) / 2);
}

/// Sizes of published checkpoints, from their configuration alone: what else is kept in 16 bits is not known.
TEST(MemoryByHand, DeclaredCheckpoints) {
  const auto folder = test::shared_dir() / "data/quant_configs";
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << "no real configs here";
  const std::map<std::string, double> gigabytes = {
      {"rohit1253__llama_2_13_B_chat_GPTQ__config.json", 7.26},     // TheBloke/Llama-2-13B-chat-GPTQ, main: 7.26 GB
      {"aiconfigurator__openai--gpt-oss-20b_config.json", 13.76},   // model card: 12.8 GiB
      {"aiconfigurator__openai--gpt-oss-120b_config.json", 65.25},  // model card: 60.8 GiB
  };
  size_t cases = 0;
  for (const auto& [file, size] : gigabytes) {
    if (!std::filesystem::is_regular_file(folder / file)) continue;
    const Json config = parse_json(test::read_file(folder / file), file);
    Json facts = model_facts(config);
    facts.update(detect_model_quantization({{"config.json", config}}, "").facts);
    EXPECT_NEAR(estimate_memory(facts, 0, plan_for("vllm", {}), {}).weights_bytes / 1e9, size, size * 0.08) << file;
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

/// Real configurations against the counts that the models' cards publish (of a name like 30B-A3B: that name).
TEST(MemoryByHand, ParametersOfRealConfigurations) {
  const auto folder = test::shared_dir() / "data/quant_configs";
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << "no real configs here";
  const std::map<std::string, double> published = {
      {"aiconfigurator__deepseek-ai--DeepSeek-R1_config.json", 671.03},
      {"aiconfigurator__moonshotai--Kimi-K2-Instruct_config.json", 1026.4},
      {"aiconfigurator__Qwen--Qwen3-235B-A22B-FP8_config.json", 235.09},
      {"aiconfigurator__Qwen--Qwen3-32B-FP8-Static-PerTensor_config.json", 32.76},
      {"aiconfigurator__openai--gpt-oss-120b_config.json", 116.83},
      {"aiconfigurator__openai--gpt-oss-20b_config.json", 20.91},
      {"aiconfigurator__MiniMaxAI--MiniMax-M2.7_config.json", 228.7},
      {"aiconfigurator__zai-org--GLM-5-FP8_config.json", 744},
      {"aiconfigurator__XiaomiMiMo--MiMo-V2-Flash_config.json", 309},
      {"aiconfigurator__nvidia--Qwen3.5-122B-A10B-NVFP4_config.json", 122},
      {"aiconfigurator__nvidia--Qwen3.6-27B-NVFP4_config.json", 27},
      {"aiconfigurator__nvidia--Qwen3.6-35B-A3B-NVFP4_config.json", 35},
      {"IrfanUruchi__Llama-3.1-8B-Computer-Networks-LLM__config.json", 8.03},
      {"rohit1253__llama_2_13_B_chat_GPTQ__config.json", 13.016},
      {"CesarChaMal__Wizard-Vicuna-30B-Uncensored-GPTQ__config.json", 32.53},
      {"itsnsreehari__KV260-Accelerated-Platform__gpt2__config.json", 0.1244},
      {"KeshavArvindh__Quantization-of-LLM-s__config.json", 2.78},
      {"roshinpv__mpx__config.json", 14.77},
      {"x1ngzai__Qwen-VL-Chat-Int4__config.json", 7.72},
  };
  size_t cases = 0;
  for (const auto& [file, billions] : published) {
    if (!std::filesystem::is_regular_file(folder / file)) continue;
    const Json config = parse_json(test::read_file(folder / file), file);
    EXPECT_NEAR(parameters_of(model_facts(config)) / 1e9, billions, billions * 0.015) << file;
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

}  // namespace
}  // namespace bitwright
