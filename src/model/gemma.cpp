#include "model/gemma.hpp"

#include <cmath>
#include <nlohmann/json.hpp>

namespace bitwright {

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
