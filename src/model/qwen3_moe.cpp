// Qwen3 with routed experts in some or all layers. Keys, defaults and tensor names as in Hugging Face transformers,
// models/qwen3_moe.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

/// A layer has experts where decoder_sparse_step says so and mlp_only_layers does not name it.
void set_experts(ModelConfig& c, const ConfigReader& config) {
  c.experts = config.integer("num_experts", 0, 1 << 16, 128);
  c.experts_used = config.integer("num_experts_per_tok", 1, std::max<int64_t>(c.experts, 1), 8);
  c.expert_feed_forward = config.integer("moe_intermediate_size", 1, 1 << 20, 768);
  c.normalise_experts = config.boolean("norm_topk_prob", false);
  const int64_t step = config.integer("decoder_sparse_step", 1, 1 << 20, 1);
  const std::vector<int64_t> dense = config.integers("mlp_only_layers", 0, 1 << 20);
  for (int64_t i = 0; i < c.layers; ++i)
    c.kinds[static_cast<size_t>(i)].experts =
        c.experts > 0 && (i + 1) % step == 0 && std::ranges::find(dense, i) == dense.end();
  c.places.experts = {
      {.router = "mlp.gate",
       .gate = "mlp.experts.{}.gate_proj",
       .up = "mlp.experts.{}.up_proj",
       .down = "mlp.experts.{}.down_proj"},
      {.router = "mlp.gate", .all_gate_up = "mlp.experts.gate_up_proj", .all_down = "mlp.experts.down_proj"}};
}

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("use_sliding_window", false);  // versions of transformers differ in which layers slide
  ModelConfig c = read_llama(config, {.kv_heads_default = 4, .context_default = 32768}, {});
  set_attention_bias(c, config.boolean("attention_bias", false));
  c.places.q_norm = "self_attn.q_norm";
  c.places.k_norm = "self_attn.k_norm";
  set_experts(c, config);
  return c;
}

}  // namespace

const Architecture qwen3_moe = {.name = "Qwen3MoeForCausalLM", .model_type = "qwen3_moe", .configure = configure};

}  // namespace bitwright::architectures
