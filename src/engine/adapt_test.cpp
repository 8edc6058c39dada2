#include "engine/adapt.hpp"

#include <gtest/gtest.h>

#include "engine/detect.hpp"
#include "engine/memory.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

std::string changes_of(const PlanRequest& request) {
  const auto adapted = adapt_plan(request);
  if (!adapted) return "nothing works";
  EXPECT_NE(adapted->plan.outcome, "error");
  std::string text;
  for (const Change& change : adapted->changes) text += change.field + " " + change.from + " -> " + change.to + "; ";
  return text;
}
const Json kHopper = {{"vendor", "nvidia"}, {"sm", 90}};

TEST(Adapt, WhatWorksStays) {
  EXPECT_EQ(changes_of({.engine = "vllm", .hardware = kHopper, .fields = {{"gemm_dtype", "fp8"}}}), "");
}

TEST(Adapt, TheNearestThatWorksIsTaken) {
  EXPECT_EQ(changes_of({.engine = "sglang", .hardware = kHopper, .fields = {{"kvcache_dtype", "int8"}}}),
            "kvcache_dtype int8 -> fp8_e4m3; ");
  EXPECT_EQ(
      changes_of(
          {.engine = "vllm", .hardware = {{"vendor", "nvidia"}, {"sm", 75}}, .fields = {{"gemm_dtype", "bfloat16"}}}),
      "gemm_dtype bfloat16 -> float16; ");
  EXPECT_EQ(
      changes_of(
          {.engine = "vllm", .hardware = kHopper, .checkpoint = "fp8", .fields = {{"kvcache_dtype", "fp8_e5m2"}}}),
      "kvcache_dtype fp8_e5m2 -> fp8_e4m3; ");
  EXPECT_EQ(changes_of({.engine = "vllm", .hardware = kHopper, .intent = {.method = "fp8", .weight_only = true}}),
            "weight_only true -> false; ");
}

TEST(Adapt, TheUsersParametersNeverGiveWay) {
  const PlanRequest request = {.engine = "vllm",
                               .hardware = kHopper,
                               .fields = {{"kvcache_dtype", "fp8"}},
                               .parameters = {{"quantization", "int8"}}};
  EXPECT_EQ(changes_of(request), "nothing works");
}

TEST(Adapt, EveryPresetWorksOnEveryEngineAfterwards) {
  const std::map<std::string, std::string> aggressive = {
      {"gemm_dtype", "bfloat16"}, {"kvcache_dtype", "fp8_e5m2"}, {"attention_dtype", "fp8"}, {"moe_dtype", "w4afp8"}};
  for (const Json* engine : Facts::standard().all("engines")) {
    const PlanRequest request = {
        .engine = (*engine)["name"], .hardware = kHopper, .model = {{"moe", true}}, .fields = aggressive};
    EXPECT_TRUE(adapt_plan(request)) << request.engine;
  }
}

Json llama8b() {
  return {{"layers", 32},         {"hidden_size", 4096},        {"heads", 32},      {"kv_heads", 8}, {"head_dim", 128},
          {"vocabulary", 128256}, {"intermediate_size", 14336}, {"context", 131072}};
}

TEST(Memory, CacheOfAnOrdinaryModel) {
  // 2 x 32 layers x 8 heads x 128 = 65536 elements a token
  EXPECT_EQ(kv_cache_elements(llama8b(), 1), 65536);
  EXPECT_EQ(kv_cache_elements(llama8b(), 8192), 65536.0 * 8192);
  EXPECT_NEAR(parameters_of(llama8b()), 8.03e9, 0.02e9);
}

TEST(Memory, ParametersAreThoseTheModelsAreNamedFor) {
  const auto folder = test::shared_dir() / "data/quant_configs";
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << "no real configs here";
  for (const auto& [file, billions] :
       std::map<std::string, double>{{"aiconfigurator__deepseek-ai--DeepSeek-V3_config.json", 671},
                                     {"aiconfigurator__Qwen--Qwen3-235B-A22B-FP8_config.json", 235},
                                     {"aiconfigurator__Qwen--Qwen3-32B-FP8-Static-PerTensor_config.json", 32.8},
                                     {"aiconfigurator__openai--gpt-oss-120b_config.json", 116.8},
                                     {"aiconfigurator__openai--gpt-oss-20b_config.json", 20.9}}) {
    const Json config = parse_json(test::read_file(folder / file), file);
    EXPECT_NEAR(parameters_of(model_facts(config)) / 1e9, billions, billions / 100) << file;
  }
}

TEST(Memory, CacheOfLatentAndWindowedAttention) {
  const Json deepseek = {
      {"layers", 61}, {"kv_lora_rank", 512}, {"qk_rope_head_dim", 64}, {"heads", 128}, {"head_dim", 56}};
  EXPECT_EQ(kv_cache_elements(deepseek, 10), 61.0 * 576 * 10);
  Json windowed = llama8b();
  windowed["sliding_layers"] = 16;
  windowed["sliding_window"] = 1024;
  EXPECT_EQ(kv_cache_elements(windowed, 4096), 2048.0 * (16 * 4096 + 16 * 1024));
}

TEST(Memory, MethodsFromSixteenBitsDown) {
  const EnginePlan plan = plan_engine({.engine = "native"});
  const auto options = weigh_methods(llama8b(), 16.06e9, plan, {.context = 4096, .memory_bytes = 8e9});
  ASSERT_EQ(options.size(), 5U);
  EXPECT_EQ(options[0].estimate.weights_bytes, 16.06e9);
  for (size_t i = 1; i < options.size(); ++i)
    EXPECT_LT(options[i].estimate.weights_bytes, options[i - 1].estimate.weights_bytes);
  const auto first = std::ranges::find_if(options, [](const SizedMethod& m) { return *m.estimate.fits; });
  ASSERT_NE(first, options.end());
  EXPECT_EQ(first->method, "int4");  // 2.1 GB of embeddings and 3.9 GB of 4.5-bit weights, 0.5 GB of cache
}

TEST(Memory, ElementsByTheEnginesOwnTypes) {
  const auto bytes = [](const char* engine, const char* type) {
    PlanRequest request = {.engine = engine, .hardware = kHopper};
    if (*type != '\0') request.fields["kvcache_dtype"] = type;
    return kv_element_bytes(plan_engine(request), 128);
  };
  for (const Json* engine : Facts::standard().all("engines"))
    EXPECT_EQ(bytes((*engine)["name"].get_ref<const std::string&>().c_str(), ""), (*engine)["name"] == "native" ? 4 : 2)
        << (*engine)["name"];
  EXPECT_EQ(bytes("vllm", "fp8"), 1);
  EXPECT_EQ(bytes("vllm", "int8"), 1 + 4.0 / 128);
  EXPECT_EQ(bytes("sglang", "fp8_e5m2"), 1);
  EXPECT_EQ(bytes("tensorrt_llm", "fp8"), 1);
  EXPECT_EQ(bytes("llamacpp", "int8"), 34.0 / 32);
  EXPECT_EQ(bytes("lmdeploy", "int4"), 0.5 + 4.0 / 128);
  EXPECT_EQ(bytes("mlx", "int4"), 0.5 + 4.0 / 64);
  EXPECT_EQ(bytes("transformers", "int8"), 1 + 4.0 / 128);
}

TEST(Memory, WeightsQuantizedWhileLoading) {
  const auto weights = [](const char* engine, const char* method) {
    const EnginePlan plan =
        plan_engine({.engine = engine,
                     .hardware = kHopper,
                     .intent = {.method = method, .weight_only = std::string_view(method) == "int4"}});
    return estimate_memory(llama8b(), 16.06e9, plan, {}).weights_bytes;
  };
  const double kept = 4.0 * 128256 * 4096, linear = 16.06e9 - kept;
  EXPECT_NEAR(weights("vllm", "fp8"), kept + linear / 2, 1);
  EXPECT_NEAR(weights("sglang", "fp8"), kept + linear / 2, 1);
  EXPECT_NEAR(weights("transformers", "int4"), kept + linear * 4.5 / 16, 1);
  EXPECT_NEAR(weights("transformers", "fp8"), kept + linear / 2, 1);
  EXPECT_NEAR(weights("tgi", "int4"), kept + linear * 4.5 / 16, 1);
  EXPECT_EQ(weights("llamacpp", "none"), 16.06e9);
}

TEST(Memory, FitsAndTheMostThatDoes) {
  const EnginePlan plan = plan_engine({.engine = "vllm", .hardware = kHopper, .fields = {{"kvcache_dtype", "fp8"}}});
  const MemoryEstimate estimate =
      estimate_memory(llama8b(), 16.06e9, plan, {.context = 8192, .batch = 4, .memory_bytes = 24e9});
  EXPECT_EQ(estimate.weights_bytes, 16.06e9);
  EXPECT_EQ(estimate.kv_cache_bytes, 4 * 8192 * 65536.0);
  ASSERT_TRUE(estimate.fits);
  const double left = estimate.kv_room_bytes;
  EXPECT_EQ(*estimate.fits, estimate.kv_cache_bytes <= left);
  EXPECT_LE(static_cast<double>(*estimate.most_batch) * 8192 * 65536, left);
  EXPECT_GT(static_cast<double>(*estimate.most_batch + 1) * 8192 * 65536, left);
  EXPECT_LE(static_cast<double>(*estimate.most_context) * 4 * 65536, left);
  const MemoryEstimate two =
      estimate_memory(llama8b(), 16.06e9, plan, {.context = 8192, .batch = 4, .tensor_parallel = 2});
  EXPECT_EQ(two.weights_bytes * 2, estimate.weights_bytes);
  EXPECT_EQ(two.kv_cache_bytes * 2, estimate.kv_cache_bytes);
  EXPECT_FALSE(two.fits);
}

}  // namespace
}  // namespace bitwright
