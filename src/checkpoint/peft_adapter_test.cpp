#include "checkpoint/peft_adapter.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/json.hpp"

namespace bitwright {
namespace {

// As PEFT 0.17 writes it, all of its fields.
const Json kWritten = Json::parse(R"({"alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "org/base",
  "bias": "none", "corda_config": null, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
  "inference_mode": true, "init_lora_weights": true, "layer_replication": null, "layers_pattern": null,
  "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 32, "lora_bias": false, "lora_dropout": 0.05,
  "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA",
  "qalora_group_size": 16, "r": 16, "rank_pattern": {}, "revision": null, "target_modules": ["v_proj", "q_proj"],
  "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_dora": false,
  "use_qalora": false, "use_rslora": true})");

std::string answer(const std::string& text) {
  try {
    parse_peft_lora(text, "adapter_config.json");
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}
std::string answer_with(const std::string& key, const Json& value) {
  Json json = kWritten;
  json[key] = value;
  return answer(json.dump());
}

TEST(PeftAdapter, ReadsWhatPeftWrites) {
  const PeftLora lora = parse_peft_lora(kWritten.dump(), "");
  EXPECT_EQ(lora.r, 16);
  EXPECT_EQ(lora.lora_alpha, 32);
  EXPECT_EQ(lora.lora_dropout, 0.05);
  EXPECT_TRUE(lora.use_rslora);
  EXPECT_FALSE(lora.fan_in_fan_out);
  EXPECT_EQ(lora.base_model, "org/base");
  EXPECT_EQ(lora.target_modules, (std::vector<std::string>{"v_proj", "q_proj"}));
  const PeftLora least = parse_peft_lora(R"({"peft_type": "LORA", "target_modules": "all-linear"})", "");
  EXPECT_EQ(least.r, 8);
  EXPECT_EQ(least.lora_alpha, 8);
  EXPECT_EQ(least.target_modules, std::vector<std::string>{"all-linear"});
}

TEST(PeftAdapter, ARegularExpressionIsLeftToTheFile) {
  EXPECT_FALSE(parse_peft_lora(R"({"peft_type": "LORA", "target_modules": ".*_proj"})", "").target_modules);
  Json json = kWritten;
  json["exclude_modules"] = "model.layers.[0-3]..*";
  EXPECT_FALSE(parse_peft_lora(json.dump(), "").target_modules);
  EXPECT_EQ(peft_layers(std::vector<std::string_view>{"base_model.model.a.b.lora_A.weight",
                                                      "base_model.model.a.b.lora_B.weight", "lora_A.weight",
                                                      "base_model.model..lora_A.weight"}),
            std::vector<std::string>{"a.b"});
  EXPECT_EQ(peft_key("a.b", "lora_A"), "base_model.model.a.b.lora_A.weight");
}

TEST(PeftAdapter, RefusesByNameWhatIsNotSupported) {
  const std::map<std::string, Json> other = {{"alora_invocation_tokens", {1, 2}},
                                             {"alpha_pattern", {{"q_proj", 4}}},
                                             {"arrow_config", {{"top_k", 3}}},
                                             {"kasa_config", {{"beta", 1e-4}}},
                                             {"layer_replication", {{0, 4}}},
                                             {"layers_to_transform", {1}},
                                             {"lora_bias", true},
                                             {"megatron_config", {{"a", 1}}},
                                             {"modules_to_save", {"lm_head"}},
                                             {"monteclora_config", {{"num_samples", 8}}},
                                             {"rank_pattern", {{"q_proj", 4}}},
                                             {"target_parameters", {"experts"}},
                                             {"trainable_token_indices", {0, 1}},
                                             {"use_bdlora", {{"nblocks", 2}}},
                                             {"use_dora", true},
                                             {"use_qalora", true},
                                             {"velora_config", {{"scale", 1}}}};
  for (const auto& [key, value] : other)
    EXPECT_EQ(answer_with(key, value),
              "cannot read adapter: adapter_config.json: it uses " + key + ", which is not supported");
  EXPECT_NE(answer_with("layers_to_transform", 0).find("layers_to_transform"), std::string::npos);
  EXPECT_NE(answer_with("peft_type", "IA3").find("peft_type is 'IA3'"), std::string::npos);
  EXPECT_NE(answer_with("bias", "lora_only").find("bias is 'lora_only'"), std::string::npos);
  for (const char* init : {"pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"})
    EXPECT_NE(answer_with("init_lora_weights", init).find("was changed with it"), std::string::npos) << init;
  for (const Json& init : {Json("gaussian"), Json("eva"), Json("orthogonal"), Json(false)})
    EXPECT_EQ(answer_with("init_lora_weights", init), "accepted") << init;
}

TEST(PeftAdapter, RefusesWhatIsOfAnotherType) {
  for (const Json& r : {Json(-1), Json(1.5), Json("4"), Json(uint64_t{1} << 63)})
    EXPECT_NE(answer_with("r", r).find("'r' is"), std::string::npos) << r;
  EXPECT_NE(answer_with("lora_alpha", "6").find("'lora_alpha' is"), std::string::npos);
  EXPECT_NE(answer_with("use_rslora", 1).find("'use_rslora' is no true or false"), std::string::npos);
  EXPECT_NE(answer_with("target_modules", {1}).find("'target_modules' is no list of names"), std::string::npos);
  EXPECT_NE(answer_with("base_model_name_or_path", 3).find("is no text"), std::string::npos);
  EXPECT_NE(answer("[]").find("it is no JSON object"), std::string::npos);
  const std::string whole = kWritten.dump();
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) EXPECT_NE(answer(whole.substr(0, bytes)), "accepted") << bytes;
}

}  // namespace
}  // namespace bitwright
