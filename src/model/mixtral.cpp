// Mixtral (arXiv:2401.04088): Mistral with routed experts in place of the feed-forward network; the weights of those
// used sum to 1. Keys, defaults and tensor names as in Hugging Face transformers, models/mixtral.
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("attention_bias", false);
  ModelConfig c = read_llama(config, {.kv_heads_default = 8, .context_default = 131072, .epsilon_default = 1e-5},
                             {.theta_default = 1e6});
  set_one_window(c, config, 0);
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
      {.router = "mlp.gate", .all_gate_up = "mlp.experts.gate_up_proj", .all_down = "mlp.experts.down_proj"},
      {.router = "block_sparse_moe.gate",
       .all_gate = "block_sparse_moe.switch_mlp.gate_proj.weight",
       .all_up = "block_sparse_moe.switch_mlp.up_proj.weight",
       .all_down = "block_sparse_moe.switch_mlp.down_proj.weight"}};
  return c;
}

constexpr auto kGgufKeys = std::to_array<GgufKey>({
    {"expert_count", "num_local_experts"},
    {"expert_used_count", "num_experts_per_tok"},
});

constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"blk.{0}.attn_q", "model.layers.{0}.self_attn.q_proj", GgufRows::pairs_of_heads},
    {"blk.{0}.attn_k", "model.layers.{0}.self_attn.k_proj", GgufRows::pairs_of_kv_heads},
    {"blk.{0}.ffn_gate_inp", "model.layers.{0}.block_sparse_moe.gate"},
    {"blk.{0}.ffn_gate_exps", "model.layers.{0}.block_sparse_moe.experts.{1}.w1", GgufRows::experts},
    {"blk.{0}.ffn_down_exps", "model.layers.{0}.block_sparse_moe.experts.{1}.w2", GgufRows::experts},
    {"blk.{0}.ffn_up_exps", "model.layers.{0}.block_sparse_moe.experts.{1}.w3", GgufRows::experts},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  set_gguf_rope(facts, config);
  set_gguf_rope_factors(facts, config);
}

const GgufMapping kGguf = {.architecture = "llama",
                           .routed = true,
                           .keys = kGgufLlamaKeys,
                           .own_keys = kGgufKeys,
                           .tensors = kGgufTensors,
                           .shared_tensors = kGgufLlamaTensors,
                           .complete = complete_gguf,
                           .rope_factors = true,
                           .biases = true};

}  // namespace

const Architecture mixtral = {
    .name = "MixtralForCausalLM", .model_type = "mixtral", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
