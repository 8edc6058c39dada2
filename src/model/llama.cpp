// Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Keys, defaults and tensor names as in Hugging Face
// transformers, models/llama (LlamaConfig, LlamaForCausalLM).
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/config_reader.hpp"

namespace bitwright::architectures {
namespace {

// Beyond any model, and small enough that no product of them passes 64 bits.
constexpr int64_t kMostLayers = 1 << 12, kMostHeads = 1 << 12, kWidest = 1 << 20, kMostWords = 1 << 24;

/// What would change the result and is not computed.
void refuse_unsupported(const ConfigReader& config) {
  config.only("hidden_act", "silu");
  config.only("attention_bias", false);
  config.only("mlp_bias", false);
  config.only("sliding_window", nullptr);
  config.only("partial_rotary_factor", 1.0);
  config.only("rope_scaling", nullptr);
}

/// transformers 5 has rope_theta within rope_parameters.
double rope_theta(const ConfigReader& config, const std::string& where) {
  constexpr double kLargest = 1e12, kDefault = 10000;
  const Json* const parameters = config.find("rope_parameters");
  if (parameters == nullptr) return config.positive("rope_theta", kLargest, kDefault);
  const ConfigReader rope(*parameters, where + ", rope_parameters");
  rope.only("rope_type", "default");
  rope.only("partial_rotary_factor", 1.0);
  return rope.positive("rope_theta", kLargest, config.positive("rope_theta", kLargest, kDefault));
}

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  refuse_unsupported(config);
  ModelConfig c = {};
  c.layers = config.integer("num_hidden_layers", 1, kMostLayers);
  c.hidden = config.integer("hidden_size", 1, kWidest);
  c.heads = config.integer("num_attention_heads", 1, kMostHeads);
  c.kv_heads = config.integer("num_key_value_heads", 1, kMostHeads, c.heads);
  if (c.heads % c.kv_heads != 0)
    config.fail("num_key_value_heads", "which does not divide num_attention_heads " + std::to_string(c.heads));
  if (config.find("head_dim") == nullptr && c.hidden % c.heads != 0)
    config.fail("num_attention_heads", "which does not divide hidden_size " + std::to_string(c.hidden));
  c.head_size = config.integer("head_dim", 2, kWidest / c.heads, c.hidden / c.heads);
  if (c.head_size % 2 != 0 || c.head_size > kWidest / c.heads)
    config.fail("head_dim", "must be even for rotary positions and at most " + std::to_string(kWidest / c.heads));
  c.feed_forward = config.integer("intermediate_size", 1, kWidest);
  c.vocabulary = config.integer("vocab_size", 1, kMostWords);
  c.context = config.integer("max_position_embeddings", 1, kMostWords, 2048);
  c.norm_epsilon = static_cast<float>(config.positive("rms_norm_eps", 1, 1e-6));
  c.rope_theta = static_cast<float>(rope_theta(config, where));
  c.tied_head = config.boolean("tie_word_embeddings", false);
  return c;
}

}  // namespace

const Architecture llama = {.name = "LlamaForCausalLM", .model_type = "llama", .configure = configure};

}  // namespace bitwright::architectures
