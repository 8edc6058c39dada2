#include "model/architectures.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace bitwright {
namespace {

/// What every architecture needs, under all the names that it may have.
Json small(const std::string& name) {
  return {{"architectures", {name}},
          {"hidden_size", 64},
          {"n_embd", 64},
          {"intermediate_size", 64},
          {"num_hidden_layers", 4},
          {"n_layer", 4},
          {"num_attention_heads", 4},
          {"n_head", 4},
          {"num_key_value_heads", nullptr},
          {"vocab_size", 50},
          {"num_experts", 4},
          {"num_experts_per_tok", 2},
          {"moe_intermediate_size", 8},
          {"text_config", {{"hidden_size", 64}}}};
}

Json small(const Architecture& row) { return small(std::string(row.name)); }

ModelConfig configure(const Json& config) { return find_architecture(config)->configure(config, "config.json"); }

/// The code of the error, if its message names `key`.
std::string refusal(const Json& config, const std::string& key) {
  try {
    configure(config);
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find('\'' + key + '\''), std::string::npos) << e.what();
    return e.code();
  }
  return "accepted";
}

std::vector<int64_t> windows(const ModelConfig& c) {
  std::vector<int64_t> out;
  for (const LayerKind& kind : c.kinds) out.push_back(kind.window);
  return out;
}

TEST(ModelArchitectures, EachRowReadsASmallConfiguration) {
  for (const Architecture* row : all_architectures()) {
    SCOPED_TRACE(row->name);
    const ModelConfig c = configure(small(*row));
    EXPECT_EQ(c.hidden, 64);
    EXPECT_EQ(c.kinds.size(), static_cast<size_t>(c.layers));
    EXPECT_EQ(find_architecture({{"model_type", row->model_type}}), row);
    for (const LayerKind& kind : c.kinds) EXPECT_TRUE(c.ropes.empty() || kind.rope < c.ropes.size());
    EXPECT_TRUE(c.ropes.empty() == (c.most_positions != 0)) << "rotary or learned positions";
  }
}

/// A key that would change the result in a way that is not computed, with such a value.
struct Unsupported {
  const char* architecture;
  const char* key;
  Json value;
};

TEST(ModelArchitectures, WhatIsNotComputedIsRefused) {
  const Json mrope = {{"rope_type", "mrope"}, {"mrope_section", {2, 2, 2}}};
  const std::vector<Unsupported> all = {
      {"LlamaForCausalLM", "hidden_act", "relu"},
      {"LlamaForCausalLM", "sliding_window", 8},
      {"LlamaForCausalLM", "partial_rotary_factor", 0.5},
      {"MistralForCausalLM", "attention_bias", true},
      {"MistralForCausalLM", "layer_types", {"full_attention"}},
      {"MistralForCausalLM", "partial_rotary_factor", 0.5},
      {"Qwen2ForCausalLM", "hidden_act", "relu2"},
      {"Qwen2ForCausalLM", "layer_types", {"full_attention", "chunked_attention", "full_attention", "full_attention"}},
      {"Qwen3ForCausalLM", "partial_rotary_factor", 0.5},
      {"GPT2LMHeadModel", "scale_attn_weights", false},
      {"GPT2LMHeadModel", "scale_attn_by_inverse_layer_idx", true},
      {"GPT2LMHeadModel", "add_cross_attention", true},
      {"GPT2LMHeadModel", "activation_function", "tanh"},
      {"GPTNeoXForCausalLM", "num_key_value_heads", 2},
      {"GPTNeoXForCausalLM", "head_dim", 16},
      {"GPTNeoXForCausalLM", "hidden_act", "relu"},
      {"Gemma2ForCausalLM", "hidden_activation", "relu"},
      {"Gemma2ForCausalLM", "use_bidirectional_attention", true},
      {"Gemma3ForCausalLM", "use_bidirectional_attention", true},
      {"Phi3ForCausalLM", "attention_bias", true},
      {"Phi3ForCausalLM", "layer_types", {"full_attention"}},
      {"MixtralForCausalLM", "attention_bias", true},
      {"MixtralForCausalLM", "layer_types", {"full_attention"}},
      {"Qwen3MoeForCausalLM", "use_sliding_window", true},
      {"Qwen3MoeForCausalLM", "hidden_act", "relu"}};
  for (const Unsupported& u : all) {
    SCOPED_TRACE(std::string(u.architecture) + ' ' + u.key);
    Json config = small(u.architecture);
    config[u.key] = u.value;
    EXPECT_EQ(refusal(config, u.key), "unsupported-config");
  }
  for (const Architecture* row : all_architectures()) {
    SCOPED_TRACE(row->name);
    Json config = small(*row);
    Json& model = row->model_type == "gemma3" ? config["text_config"] : config;
    model["rope_scaling"] = mrope;
    if (configure(small(*row)).ropes.empty()) continue;
    EXPECT_EQ(refusal(config, "rope_type"), "unsupported-config");
  }
}

TEST(ModelArchitectures, RopeContradictions) {
  const auto with = [](const Json& rope) {
    Json config = small("LlamaForCausalLM");
    config["max_position_embeddings"] = 64;
    config["rope_scaling"] = rope;
    return config;
  };
  EXPECT_EQ(refusal(with({{"rope_type", "linear"}}), "factor"), "bad-config");
  EXPECT_EQ(refusal(with({{"rope_type", "linear"}, {"factor", 0}}), "factor"), "bad-config");
  EXPECT_EQ(refusal(with({{"rope_type", 3}}), "rope_type"), "bad-config");
  EXPECT_EQ(refusal(with({{"type", "dynamic"}, {"factor", 2}, {"alpha", 1000}}), "alpha"), "unsupported-config");
  EXPECT_EQ(refusal(with({{"type", "yarn"}, {"factor", 2}, {"short_factor", {1}}}), "short_factor"),
            "unsupported-config");
  EXPECT_EQ(refusal(with({{"type", "longrope"}, {"short_factor", {1, 2}}, {"long_factor", {1, 2}}}), "long_factor"),
            "bad-config");
  EXPECT_EQ(refusal(with({{"rope_type", "llama3"},
                          {"factor", 8},
                          {"low_freq_factor", 4},
                          {"high_freq_factor", 1},
                          {"original_max_position_embeddings", 32}}),
                    "high_freq_factor"),
            "bad-config");
  // What was stretched is meant for longer texts.
  EXPECT_EQ(configure(with({{"rope_type", "dynamic"}, {"factor", 3}})).context, 192);
  EXPECT_EQ(configure(with({{"rope_type", "yarn"}, {"factor", 4}, {"original_max_position_embeddings", 32}})).context,
            128);
  EXPECT_EQ(configure(with({{"rope_type", "linear"}, {"factor", 4}})).context, 64);
}

TEST(ModelArchitectures, Windows) {
  Json mistral = small("MistralForCausalLM");
  EXPECT_EQ(windows(configure(mistral)), (std::vector<int64_t>{4096, 4096, 4096, 4096}));
  mistral["sliding_window"] = nullptr;
  EXPECT_EQ(windows(configure(mistral)), (std::vector<int64_t>{0, 0, 0, 0}));
  Json qwen = small("Qwen2ForCausalLM");
  qwen["max_window_layers"] = 3;
  EXPECT_EQ(windows(configure(qwen)), (std::vector<int64_t>{0, 0, 0, 0}));
  qwen["use_sliding_window"] = true;
  EXPECT_EQ(windows(configure(qwen)), (std::vector<int64_t>{0, 0, 0, 4096}));
  qwen["layer_types"] = {"sliding_attention", "full_attention"};
  EXPECT_EQ(refusal(qwen, "layer_types"), "bad-config");
  qwen["layer_types"] = {"sliding_attention", "full_attention", "full_attention", "full_attention"};
  EXPECT_EQ(windows(configure(qwen)), (std::vector<int64_t>{4096, 0, 0, 0}));
  qwen["use_sliding_window"] = false;
  EXPECT_EQ(refusal(qwen, "layer_types"), "bad-config");
}

TEST(ModelArchitectures, Defaults) {
  Json gemma = small("Gemma2ForCausalLM");
  EXPECT_EQ(configure(gemma).attention_cap, 50);
  EXPECT_EQ(configure(gemma).logit_cap, 30);
  EXPECT_TRUE(configure(gemma).tied_head);
  gemma["attn_logit_softcapping"] = nullptr;
  EXPECT_EQ(configure(gemma).attention_cap, 0);
  Json mixtral = small("MixtralForCausalLM");
  EXPECT_EQ(configure(mixtral).kv_heads, 4);  // null: as many as heads
  mixtral["num_attention_heads"] = 16;
  mixtral.erase("num_key_value_heads");
  EXPECT_EQ(configure(mixtral).kv_heads, 8);
  mixtral["num_experts_per_tok"] = 9;
  EXPECT_EQ(refusal(mixtral, "num_experts_per_tok"), "bad-config");
  Json neox = small("GPTNeoXForCausalLM");
  EXPECT_TRUE(configure(neox).parallel);
  neox["rotary_pct"] = 0.5;
  EXPECT_EQ(configure(neox).ropes[0].frequencies.size(), 4u);
  neox["rotary_pct"] = 0.2;
  EXPECT_EQ(refusal(neox, "rotary_pct"), "bad-config");  // of 16 elements 3: no pairs
}

TEST(ModelArchitectures, ByName) {
  EXPECT_EQ(find_architecture({{"model_type", "llama"}})->name, "LlamaForCausalLM");
  for (const Json& other :
       {Json::object(), Json::array(), Json{{"architectures", {"MambaForCausalLM"}}}, Json{{"architectures", {7}}},
        Json{{"architectures", "LlamaForCausalLM"}}, Json{{"model_type", 7}}})
    EXPECT_EQ(find_architecture(other), nullptr) << other.dump();
}

}  // namespace
}  // namespace bitwright
