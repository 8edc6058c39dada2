// Qwen3 (arXiv:2505.09388): Llama with an RMSNorm on each head's query and key. Keys and defaults as in Hugging Face
// transformers, models/qwen3.
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  ModelConfig c = read_llama(config, {.kv_heads_default = 32, .head_size_default = 128, .context_default = 32768}, {});
  set_attention_bias(c, config.boolean("attention_bias", false));
  c.places.q_norm = "self_attn.q_norm";
  c.places.k_norm = "self_attn.k_norm";
  const int64_t window = config.boolean("use_sliding_window", false) ? read_window(config, 4096) : 0;
  const int64_t full = config.integer("max_window_layers", 0, 1 << 20, 28);
  set_windows(c, config, window, [&](int64_t layer) { return layer >= full; });
  return c;
}

constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"blk.{0}.attn_q_norm", "model.layers.{0}.self_attn.q_norm"},
    {"blk.{0}.attn_k_norm", "model.layers.{0}.self_attn.k_norm"},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  config["attention_bias"] = facts.has_tensor("blk.0.attn_q.bias");
  set_gguf_rope(facts, config);
}

const GgufMapping kGguf = {.architecture = "qwen3",
                           .keys = kGgufLlamaKeys,
                           .tensors = kGgufTensors,
                           .shared_tensors = kGgufLlamaTensors,
                           .complete = complete_gguf};

}  // namespace

const Architecture qwen3 = {.name = "Qwen3ForCausalLM", .model_type = "qwen3", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
