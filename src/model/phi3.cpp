// Phi-3, Phi-3.5, Phi-4 (arXiv:2404.14219): Llama with q, k and v in one matrix, gate and up in another, and LongRoPE.
// Keys and defaults as in Hugging Face transformers, models/phi3.
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
  ModelConfig c =
      read_llama(config, {.context_default = 4096, .epsilon_default = 1e-5}, {.partial = "partial_rotary_factor"});
  set_fused_qkv(c, {.name = "self_attn.qkv_proj"});
  const MatrixPlace fused = {
      .name = "mlp.gate_up_proj", .stored = 2 * c.feed_forward, .run = c.feed_forward, .step = 2 * c.feed_forward};
  c.places.gate = c.places.up = fused;
  c.places.up.first = c.feed_forward;
  set_one_window(c, config, 0);
  return c;
}

constexpr auto kGgufTensors = std::to_array<GgufTensor>({
    {"blk.{0}.attn_qkv", "model.layers.{0}.self_attn.qkv_proj"},
    {"blk.{0}.ffn_up", "model.layers.{0}.mlp.gate_up_proj"},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  set_gguf_window(facts, config);
  set_gguf_rope(facts, config);
  const Json longer = facts.numbers("rope_factors_long.weight"), shorter = facts.numbers("rope_factors_short.weight");
  if (longer.is_null() || shorter.is_null()) return;
  config["rope_scaling"] = {{"rope_type", "longrope"}, {"long_factor", longer}, {"short_factor", shorter}};
  if (const int64_t original = facts.integer("rope.scaling.original_context_length", 1, int64_t{1} << 40, 0))
    config["original_max_position_embeddings"] = original;
  if (const double factor = facts.number("rope.scaling.attn_factor", 0); factor > 0)
    config["rope_scaling"]["attention_factor"] = factor;
}

const GgufMapping kGguf = {.architecture = "phi3",
                           .keys = kGgufLlamaKeys,
                           .tensors = kGgufTensors,
                           .shared_tensors = kGgufLlamaTensors,
                           .complete = complete_gguf,
                           .window_key = true};

}  // namespace

const Architecture phi3 = {.name = "Phi3ForCausalLM", .model_type = "phi3", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
