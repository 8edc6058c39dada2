// Qwen3 with routed experts in some or all layers. Keys, defaults and tensor names as in Hugging Face transformers,
// models/qwen3_moe.
#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
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
      {.router = "mlp.gate", .all_gate_up = "mlp.experts.gate_up_proj", .all_down = "mlp.experts.down_proj"},
      {.router = "mlp.gate",
       .all_gate = "mlp.switch_mlp.gate_proj.weight",
       .all_up = "mlp.switch_mlp.up_proj.weight",
       .all_down = "mlp.switch_mlp.down_proj.weight"}};
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

constexpr auto kGgufKeys = std::to_array<GgufKey>({
    {"expert_count", "num_experts"},
    {"expert_used_count", "num_experts_per_tok"},
    {"expert_feed_forward_length", "moe_intermediate_size"},
});

constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"blk.{0}.attn_q_norm", "model.layers.{0}.self_attn.q_norm"},
    {"blk.{0}.attn_k_norm", "model.layers.{0}.self_attn.k_norm"},
    {"blk.{0}.ffn_gate_inp", "model.layers.{0}.mlp.gate"},
    {"blk.{0}.ffn_gate_exps", "model.layers.{0}.mlp.experts.{1}.gate_proj", GgufRows::experts},
    {"blk.{0}.ffn_up_exps", "model.layers.{0}.mlp.experts.{1}.up_proj", GgufRows::experts},
    {"blk.{0}.ffn_down_exps", "model.layers.{0}.mlp.experts.{1}.down_proj", GgufRows::experts},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  config["norm_topk_prob"] = true;  // llama.cpp always does
  set_gguf_rope(facts, config);
}

const GgufMapping kGguf = {.architecture = "qwen3moe",
                           .routed = true,
                           .keys = kGgufLlamaKeys,
                           .own_keys = kGgufKeys,
                           .tensors = kGgufTensors,
                           .shared_tensors = kGgufLlamaTensors,
                           .complete = complete_gguf};

}  // namespace

const Architecture qwen3_moe = {
    .name = "Qwen3MoeForCausalLM", .model_type = "qwen3_moe", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
