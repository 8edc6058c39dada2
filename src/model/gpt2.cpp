// GPT-2 (Radford et al. 2019): LayerNorm, learned positions, matrices stored [inputs, outputs] ("Conv1D"), q, k and v
// in one of them. Keys, defaults and tensor names as in Hugging Face transformers, models/gpt2.
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
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
  places.prefix = "transformer.";
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

constexpr auto kGgufKeys = std::to_array<GgufKey>({
    {"block_count", "n_layer"},
    {"embedding_length", "n_embd"},
    {"feed_forward_length", "n_inner"},
    {"attention.head_count", "n_head"},
    {"attention.layer_norm_epsilon", "layer_norm_epsilon"},
    {"context_length", "n_positions"},
});

constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"token_embd", "transformer.wte"},
    {"position_embd", "transformer.wpe"},
    {"output_norm", "transformer.ln_f"},
    {"output", "lm_head"},
    {"blk.{0}.attn_norm", "transformer.h.{0}.ln_1"},
    {"blk.{0}.attn_qkv", "transformer.h.{0}.attn.c_attn", GgufRows::transposed},
    {"blk.{0}.attn_output", "transformer.h.{0}.attn.c_proj", GgufRows::transposed},
    {"blk.{0}.ffn_norm", "transformer.h.{0}.ln_2"},
    {"blk.{0}.ffn_up", "transformer.h.{0}.mlp.c_fc", GgufRows::transposed},
    {"blk.{0}.ffn_down", "transformer.h.{0}.mlp.c_proj", GgufRows::transposed},
});

const GgufMapping kGguf = {.architecture = "gpt2",
                           .keys = kGgufKeys,
                           .tensors = kGgufTensors,
                           .biases = true,
                           .activation = Activation::gelu_tanh};

}  // namespace

const Architecture gpt2 = {.name = "GPT2LMHeadModel", .model_type = "gpt2", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
