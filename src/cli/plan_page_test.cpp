#include "cli/plan_page.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace bitwright {
namespace {

/// The plan of a model with 32 layers, as `plan --json` has it.
OrderedJson plan_of_model() {
  OrderedJson tensors = OrderedJson::array();
  const auto add = [&](const std::string& name, const std::string& scheme, double bytes,
                       const std::string& reason = "") {
    tensors.push_back({{"name", name + ".weight"},
                       {"shape", {1, 1}},
                       {"scheme", scheme},
                       {"algorithm", scheme == "bfloat16" ? "" : "rtn"},
                       {"bytes", bytes},
                       {"reason", reason}});
  };
  add("model.embed_tokens", "bfloat16", 1e9, "embedding");
  for (int layer = 0; layer < 32; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer);
    for (const char* name : {".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.o_proj"})
      add(prefix + name, "int4 group 64", 1e7);
    for (const char* name : {".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj"})
      add(prefix + name, layer < 2 ? "int8 per channel" : "int4 group 64", 2e7);
    for (const char* name : {".input_layernorm", ".post_attention_layernorm"})
      add(prefix + name, "bfloat16", 8192, "norm");
  }
  return {{"intent", "int4"},
          {"quant_config", "No quantization"},
          {"scheme", "int4 group 64"},
          {"algorithm", "rtn"},
          {"container", "native"},
          {"tensors", tensors},
          {"checkpoint", {{"method", ""}, {"scheme", ""}, {"bits", 0.0}}},
          {"hardware", "h100"},
          {"predicted",
           {{"bytes", 4e9},
            {"weights_bytes", 4e9},
            {"kv_cache_bytes", 1e10},
            {"activation_bytes", 1e9},
            {"overhead_bytes", 0},
            {"total_bytes", 15e9},
            {"context", 8192},
            {"batch", 4},
            {"memory_bytes", 2e10},
            {"fits", true},
            {"most_context", 32768},
            {"most_batch", 7}}},
          {"engine",
           {{"name", "vllm"},
            {"version", "0.28.0"},
            {"outcome", "ok"},
            {"explained", OrderedJson::array()},
            {"answers", OrderedJson::array()},
            {"overrides", OrderedJson::array()},
            {"resolved", OrderedJson::object()},
            {"config_file", OrderedJson::object()},
            {"command", "vllm serve M"}}},
          {"explain", false},
          {"errors", OrderedJson::array()}};
}

std::string page_of(const OrderedJson& plan) {
  testing::internal::CaptureStdout();
  print_plan(plan);
  return testing::internal::GetCapturedStdout();
}

TEST(PlanPage, IsAScreenForAModelOfManyTensors) {
  const std::string page = page_of(plan_of_model());
  EXPECT_LE(std::ranges::count(page, '\n'), 24) << page;
  for (const char* line :
       {"vllm 0.28.0 on h100: ok\n", "weights     int4 group 64 by rtn, container native: 3.73 GiB\n",
        "q_proj k_proj v_proj o_proj x32\n", "gate_proj up_proj down_proj x30\n", "gate_proj up_proj down_proj x2\n",
        "embed_tokens: embedding\n", "input_layernorm post_attention_layernorm x32: norm\n",
        "[##########=========================---            ] of 18.63 GiB: fits\n",
        "fits up to 32768 tokens, or 7 sequences\n", "\nvllm serve M\n"})
    EXPECT_NE(page.find(line), std::string::npos) << line << page;
}

TEST(PlanPage, TheBarIsNeverLongerThanTheMemory) {
  OrderedJson plan = plan_of_model();
  plan["predicted"]["memory_bytes"] = 1e9;
  plan["predicted"]["fits"] = false;
  EXPECT_NE(page_of(plan).find("[" + std::string(50, '#') + "] of 0.93 GiB: does not fit\n"), std::string::npos);
}

}  // namespace
}  // namespace bitwright
