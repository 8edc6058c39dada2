#include "model/gemma.hpp"

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

namespace bitwright {
namespace {

constexpr auto kTensors = std::to_array<GgufTensor>({
    {"output_norm", "model.norm", GgufRows::minus_one},
    {"blk.{0}.attn_norm", "model.layers.{0}.input_layernorm", GgufRows::minus_one},
    {"blk.{0}.attn_q_norm", "model.layers.{0}.self_attn.q_norm", GgufRows::minus_one},
    {"blk.{0}.attn_k_norm", "model.layers.{0}.self_attn.k_norm", GgufRows::minus_one},
    {"blk.{0}.post_attention_norm", "model.layers.{0}.post_attention_layernorm", GgufRows::minus_one},
    {"blk.{0}.ffn_norm", "model.layers.{0}.pre_feedforward_layernorm", GgufRows::minus_one},
    {"blk.{0}.post_ffw_norm", "model.layers.{0}.post_feedforward_layernorm", GgufRows::minus_one},
});

}  // namespace

const std::span<const GgufTensor> kGgufGemmaTensors = kTensors;

void complete_gguf_gemma(const GgufFacts& facts, Json& config, int64_t layers_of_largest) {
  constexpr int64_t kMost = 1 << 20;
  const int64_t heads = facts.integer("attention.head_count", 1, kMost, 1);
  const int64_t hidden_a_head = facts.integer("embedding_length", 1, kMost, 1) / heads;
  const int64_t head_size = facts.integer("attention.key_length", 1, kMost, hidden_a_head);
  const bool largest = facts.integer("block_count", 1, kMost, 1) == layers_of_largest;
  config["query_pre_attn_scalar"] = largest ? hidden_a_head : head_size;
}

ModelConfig read_gemma(const ConfigReader& config, StandardKeys keys) {
  config.only("use_bidirectional_attention", false);
  keys.activation = "hidden_activation";
  keys.activation_default = "gelu_pytorch_tanh";
  keys.head_size_default = 256;
  keys.tied_default = true;
  ModelConfig c = read_dimensions(config, keys);
  set_llama_places(c);
  set_attention_bias(c, config.boolean("attention_bias", false));
  c.embedding_scale = std::sqrt(static_cast<float>(c.hidden));
  c.norm_offset = 1;
  c.attention_scale = static_cast<float>(1 / std::sqrt(config.positive("query_pre_attn_scalar", 1e6, 256)));
  c.places.post_attention_norm = "post_attention_layernorm";
  c.places.feed_forward_norm = "pre_feedforward_layernorm";
  c.places.post_feed_forward_norm = "post_feedforward_layernorm";
  return c;
}

}  // namespace bitwright
