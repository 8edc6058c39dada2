// Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Keys, defaults and tensor names as in Hugging Face
// transformers, models/llama (LlamaConfig, LlamaForCausalLM).
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("sliding_window", nullptr);
  ModelConfig c = read_llama(config, {}, {});
  set_attention_bias(c, config.boolean("attention_bias", false));
  const bool bias = config.boolean("mlp_bias", false);
  for (MatrixPlace* place : {&c.places.gate, &c.places.up, &c.places.down}) place->bias = bias;
  return c;
}

// llama.cpp calls Mistral by this name too, and orders the rows of q and k for its own rotary kernel.
constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"blk.{0}.attn_q", "model.layers.{0}.self_attn.q_proj", GgufRows::pairs_of_heads},
    {"blk.{0}.attn_k", "model.layers.{0}.self_attn.k_proj", GgufRows::pairs_of_kv_heads},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  config["attention_bias"] = facts.has_tensor("blk.0.attn_q.bias");
  config["mlp_bias"] = facts.has_tensor("blk.0.ffn_up.bias");
  set_gguf_rope(facts, config);
  set_gguf_rope_factors(facts, config);
}

}  // namespace

const Architecture llama = {
    .name = "LlamaForCausalLM", .model_type = "llama", .configure = configure, .gguf = &kGgufLlama};

}  // namespace bitwright::architectures

namespace bitwright {

const GgufMapping kGgufLlama = {.architecture = "llama",
                                .keys = kGgufLlamaKeys,
                                .tensors = architectures::kGgufTensors,
                                .shared_tensors = kGgufLlamaTensors,
                                .complete = architectures::complete_gguf,
                                .rope_factors = true,
                                .biases = true};

}  // namespace bitwright
