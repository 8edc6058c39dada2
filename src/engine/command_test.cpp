#include <gtest/gtest.h>

#include "engine/plan.hpp"

namespace bitwright {
namespace {

std::string command(const PlanRequest& request, std::string_view model = "M") {
  return engine_command(plan_engine(request), model);
}

TEST(EngineCommand, IsQuotedForAShell) {
  EXPECT_EQ(command({.engine = "vllm", .fields = {{"kvcache_dtype", "fp8"}}}, "it's here; rm"),
            "vllm serve 'it'\\''s here; rm' --kv-cache-dtype fp8");
  EXPECT_EQ(command({.engine = "vllm", .parameters = {{"enforce-eager", true}, {"rope", {{"a", 1}}}}}),
            "vllm serve M --enforce-eager --rope '{\"a\":1}'");
}

TEST(EngineCommand, NamesTheConfigurationFile) {
  EXPECT_EQ(command({.engine = "tensorrt_llm", .fields = {{"gemm_dtype", "bfloat16"}}}),
            "trtllm-serve M --config llm_args.yaml");
}

TEST(EngineCommand, IsAPythonCallWhereTheEngineIsOne) {
  EXPECT_EQ(command({.engine = "transformers"}, "a\"b"), R"(AutoModelForCausalLM.from_pretrained("a\"b"))");
  PlanRequest request{.engine = "transformers", .fields = {{"gemm_dtype", "bfloat16"}, {"kvcache_dtype", "int4"}}};
  request.intent.method = "int8";
  request.parameters = {{"low-cpu-mem-usage", true}, {"extra", false}};
  EXPECT_EQ(command(request),
            "model = AutoModelForCausalLM.from_pretrained(\"M\", dtype=\"bfloat16\", extra=False, "
            "low_cpu_mem_usage=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True)); "
            "model.generate(**inputs, cache_config={\"backend\": \"quanto\", \"nbits\": 4}, "
            "cache_implementation=\"quantized\")");
}

TEST(EngineCommand, KeepsWhatTheUserSwitchesOff) {
  PlanRequest request{.engine = "vllm"};
  request.parameters = {{"enable-prefix-caching", false}, {"enforce-eager", true}};
  EXPECT_EQ(command(request), "vllm serve M --no-enable-prefix-caching --enforce-eager");
  request.engine = "sglang";  // its switches have no opposite
  EXPECT_EQ(command(request), "sglang serve --model-path M --enforce-eager");
}

TEST(EngineCommand, NumbersAreNumbersToPython) {
  PlanRequest request{.engine = "transformers"};
  request.parameters = {{"max_length", 16}, {"ratio", "0.5"}, {"revision", "v1"}};
  EXPECT_EQ(command(request), R"(AutoModelForCausalLM.from_pretrained("M", max_length=16, ratio=0.5, revision="v1"))");
}

}  // namespace
}  // namespace bitwright
