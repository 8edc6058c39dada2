// GPT-NeoX (arXiv:2204.06745) and Pythia: LayerNorm, rotary positions for a part of each head, attention and
// feed-forward side by side, q, k and v of each head after another in one matrix. Keys, defaults and tensor names as in
// Hugging Face transformers, models/gpt_neox.
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
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

}  // namespace

const Architecture gpt_neox = {.name = "GPTNeoXForCausalLM", .model_type = "gpt_neox", .configure = configure};

}  // namespace bitwright::architectures
