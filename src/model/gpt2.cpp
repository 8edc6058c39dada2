// GPT-2 (Radford et al. 2019): LayerNorm, learned positions, matrices stored [inputs, outputs] ("Conv1D"), q, k and v
// in one of them. Keys, defaults and tensor names as in Hugging Face transformers, models/gpt2.
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("scale_attn_weights", true);
  config.only("scale_attn_by_inverse_layer_idx", false);
  config.only("add_cross_attention", false);
  const int64_t hidden = config.integer("n_embd", 1, 1 << 18);
  ModelConfig c = read_dimensions(config, {.layers = "n_layer",
                                           .hidden = "n_embd",
                                           .heads = "n_head",
                                           .feed_forward = "n_inner",
                                           .context = "n_positions",
                                           .epsilon = "layer_norm_epsilon",
                                           .activation = "activation_function",
                                           .feed_forward_default = 4 * hidden,
                                           .context_default = 1024,
                                           .epsilon_default = 1e-5,
                                           .activation_default = "gelu_new",
                                           .tied_default = true});
  c.most_positions = c.context;
  c.norm = NormKind::layer;
  TensorPlaces& places = c.places;
  places.embedding = "wte";
  places.positions = "wpe";
  places.final_norm = "ln_f";
  places.layers = "h";
  places.attention_norm = "ln_1";
  places.feed_forward_norm = "ln_2";
  set_fused_qkv(c, {.name = "attn.c_attn", .bias = true, .transposed = true});
  places.o = {.name = "attn.c_proj", .bias = true, .transposed = true};
  places.up = {.name = "mlp.c_fc", .bias = true, .transposed = true};
  places.down = {.name = "mlp.c_proj", .bias = true, .transposed = true};
  places.leftovers = {".attn.bias", ".attn.masked_bias"};  // the causal mask
  return c;
}

}  // namespace

const Architecture gpt2 = {.name = "GPT2LMHeadModel", .model_type = "gpt2", .configure = configure};

}  // namespace bitwright::architectures
