#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "model/model.hpp"

namespace bitwright {
namespace {

Json good_config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 64},
          {"intermediate_size", 172},
          {"num_hidden_layers", 5},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 4},
          {"vocab_size", 512}};
}

ModelConfig configure(const Json& config) { return find_architecture(config)->configure(config, "config.json"); }

/// Refused with `code`, and the message names `key`.
void expect_refused(const Json& config, const std::string& key, const std::string& code = "bad-config") {
  try {
    configure(config);
    ADD_FAILURE() << "accepted: " << config.dump();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code);
    EXPECT_NE(std::string(e.what()).find('\'' + key + '\''), std::string::npos) << e.what();
  }
}

TEST(ModelLlamaConfig, Defaults) {
  Json config = good_config();
  config.erase("num_key_value_heads");
  const ModelConfig c = configure(config);
  EXPECT_EQ(c.kv_heads, 8);
  EXPECT_EQ(c.head_size, 8);
  EXPECT_EQ(c.context, 2048);
  EXPECT_EQ(c.norm_epsilon, 1e-6f);
  ASSERT_EQ(c.ropes.size(), 1u);
  EXPECT_DOUBLE_EQ(c.ropes[0].frequencies[1], std::pow(10000.0, -0.25));
  EXPECT_FALSE(c.tied_head);
}

TEST(ModelLlamaConfig, Given) {
  Json config = good_config();
  config.update({{"head_dim", 32},
                 {"max_position_embeddings", 128},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 500000},
                 {"rope_scaling", nullptr},
                 {"num_key_value_heads", nullptr},
                 {"hidden_act", "silu"},
                 {"attention_bias", false},
                 {"partial_rotary_factor", 1.0},
                 {"tie_word_embeddings", true}});
  const ModelConfig c = configure(config);
  EXPECT_EQ(c.head_size, 32);
  EXPECT_EQ(c.context, 128);
  EXPECT_EQ(c.norm_epsilon, 1e-5f);
  EXPECT_DOUBLE_EQ(c.ropes[0].frequencies[1], std::pow(500000.0, -1.0 / 16));
  EXPECT_TRUE(c.tied_head);
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 20000.0}};
  EXPECT_DOUBLE_EQ(configure(config).ropes[0].frequencies[1], std::pow(20000.0, -1.0 / 16));
}

TEST(ModelLlamaConfig, MissingKeys) {
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
    Json config = good_config();
    config.erase(key);
    expect_refused(config, key);
  }
}

TEST(ModelLlamaConfig, BadValues) {
  const Json any = {"64", 64.5, true, -1, 0, 1e30, 18446744073709551615u, Json::array(), Json::object()};
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim"})
    for (const Json& value : any) {
      Json config = good_config();
      config[key] = value;
      expect_refused(config, key);
    }
  for (const char* key : {"rms_norm_eps", "rope_theta"})
    for (const Json& value : Json{"1", true, 0, -1.0, 1e30, Json::array()}) {
      Json config = good_config();
      config[key] = value;
      expect_refused(config, key);
    }
  Json config = good_config();
  config["tie_word_embeddings"] = "yes";
  expect_refused(config, "tie_word_embeddings");
}

TEST(ModelLlamaConfig, Contradictions) {
  const Json changes = {{"num_key_value_heads", 3}, {"num_attention_heads", 12}, {"head_dim", 7}};
  for (const auto& [key, value] : changes.items()) {
    Json config = good_config();
    config[key] = value;
    expect_refused(config, key);
  }
}

TEST(ModelLlamaConfig, NotSupported) {
  const Json changes = {{"hidden_act", "relu"}, {"sliding_window", 4096}, {"partial_rotary_factor", 0.5}};
  for (const auto& [key, value] : changes.items()) {
    Json config = good_config();
    config[key] = value;
    expect_refused(config, key, "unsupported-config");
  }
  Json config = good_config();
  config["rope_parameters"] = {{"rope_type", "mrope"}};
  expect_refused(config, "rope_type", "unsupported-config");
  config["rope_parameters"] = {{"partial_rotary_factor", 0.5}};
  expect_refused(config, "partial_rotary_factor", "unsupported-config");
  config["rope_parameters"] = {{"full_attention", {{"rope_type", "default"}}}};
  expect_refused(config, "full_attention", "unsupported-config");
}

TEST(ModelArchitectures, ByName) {
  EXPECT_EQ(find_architecture(good_config())->name, "LlamaForCausalLM");
  EXPECT_EQ(find_architecture({{"model_type", "llama"}})->name, "LlamaForCausalLM");
  for (const Json& other :
       {Json::object(), Json::array(), Json{{"architectures", {"MambaForCausalLM"}}}, Json{{"architectures", {7}}},
        Json{{"architectures", "LlamaForCausalLM"}}, Json{{"model_type", 7}}})
    EXPECT_EQ(find_architecture(other), nullptr) << other.dump();
}

}  // namespace
}  // namespace bitwright
