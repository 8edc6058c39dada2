// GPT-NeoX (arXiv:2204.06745) and Pythia: LayerNorm, rotary positions for a part of each head, attention and
// feed-forward side by side, q, k and v of each head after another in one matrix. Keys, defaults and tensor names as in
// Hugging Face transformers, models/gpt_neox.
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("num_key_value_heads", nullptr);
  config.only("head_dim", nullptr);
  ModelConfig c =
      read_dimensions(config, {.epsilon = "layer_norm_eps", .epsilon_default = 1e-5, .activation_default = "gelu"});
  set_rope(c, config, {.theta = "rotary_emb_base", .partial = "rotary_pct", .partial_default = 0.25});
  c.norm = NormKind::layer;
  c.parallel = config.boolean("use_parallel_residual", true);
  const bool bias = config.boolean("attention_bias", true);
  const auto of_each_head = [&](int64_t part) {
    return MatrixPlace{.name = "attention.query_key_value",
                       .bias = bias,
                       .stored = 3 * c.hidden,
                       .first = part * c.head_size,
                       .run = c.head_size,
                       .step = 3 * c.head_size};
  };
  TensorPlaces& places = c.places;
  places.prefix = "gpt_neox.";
  places.embedding = "embed_in";
  places.final_norm = "final_layer_norm";
  places.head = "embed_out";
  places.q = of_each_head(0);
  places.k = of_each_head(1);
  places.v = of_each_head(2);
  places.o = {.name = "attention.dense", .bias = bias};
  places.up = {.name = "mlp.dense_h_to_4h", .bias = true};
  places.down = {.name = "mlp.dense_4h_to_h", .bias = true};
  places.leftovers = {".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"};
  return c;
}

constexpr auto kGgufKeys = std::to_array<GgufKey>({
    {"block_count", "num_hidden_layers"},
    {"embedding_length", "hidden_size"},
    {"feed_forward_length", "intermediate_size"},
    {"attention.head_count", "num_attention_heads"},
    {"attention.layer_norm_epsilon", "layer_norm_eps"},
    {"context_length", "max_position_embeddings"},
    {"rope.freq_base", "rotary_emb_base"},
    {"use_parallel_residual", "use_parallel_residual"},
});

constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"token_embd", "gpt_neox.embed_in"},
    {"output_norm", "gpt_neox.final_layer_norm"},
    {"output", "embed_out"},
    {"blk.{0}.attn_norm", "gpt_neox.layers.{0}.input_layernorm"},
    {"blk.{0}.attn_qkv", "gpt_neox.layers.{0}.attention.query_key_value", GgufRows::parts_of_heads},
    {"blk.{0}.attn_output", "gpt_neox.layers.{0}.attention.dense"},
    {"blk.{0}.ffn_norm", "gpt_neox.layers.{0}.post_attention_layernorm"},
    {"blk.{0}.ffn_up", "gpt_neox.layers.{0}.mlp.dense_h_to_4h"},
    {"blk.{0}.ffn_down", "gpt_neox.layers.{0}.mlp.dense_4h_to_h"},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  config["attention_bias"] = facts.has_tensor("blk.0.attn_qkv.bias");
  const int64_t heads = facts.integer("attention.head_count", 1, 1 << 20, 1);
  const int64_t size = facts.integer("embedding_length", 1, 1 << 20, 1) / heads;
  const int64_t turning = facts.integer("rope.dimension_count", 2, 1 << 20, size);
  config["rotary_pct"] = static_cast<double>(turning) / static_cast<double>(std::max<int64_t>(size, 1));
}

const GgufMapping kGguf = {.architecture = "gptneox",
                           .keys = kGgufKeys,
                           .tensors = kGgufTensors,
                           .complete = complete_gguf,
                           .biases = true,
                           .activation = Activation::gelu_tanh};

}  // namespace

const Architecture gpt_neox = {
    .name = "GPTNeoXForCausalLM", .model_type = "gpt_neox", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
