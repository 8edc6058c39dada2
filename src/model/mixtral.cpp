// Mixtral (arXiv:2401.04088): Mistral with routed experts in place of the feed-forward network; the weights of those
// used sum to 1. Keys, defaults and tensor names as in Hugging Face transformers, models/mixtral.
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("attention_bias", false);
  ModelConfig c = read_llama(config, {.kv_heads_default = 8, .context_default = 131072, .epsilon_default = 1e-5},
                             {.theta_default = 1e6});
  set_windows(c, config, read_window(config, 0), [](int64_t) { return true; });
  c.experts = config.integer("num_local_experts", 1, 1 << 16, 8);
  c.experts_used = config.integer("num_experts_per_tok", 1, c.experts, 2);
  c.expert_feed_forward = c.feed_forward;
  c.normalise_experts = true;
  for (LayerKind& kind : c.kinds) kind.experts = true;
  c.places.experts = {
      {.router = "block_sparse_moe.gate",
       .gate = "block_sparse_moe.experts.{}.w1",
       .up = "block_sparse_moe.experts.{}.w3",
       .down = "block_sparse_moe.experts.{}.w2"},
      {.router = "mlp.gate", .all_gate_up = "mlp.experts.gate_up_proj", .all_down = "mlp.experts.down_proj"}};
  return c;
}

}  // namespace

const Architecture mixtral = {.name = "MixtralForCausalLM", .model_type = "mixtral", .configure = configure};

}  // namespace bitwright::architectures
