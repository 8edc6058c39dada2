// Phi-3, Phi-3.5, Phi-4 (arXiv:2404.14219): Llama with q, k and v in one matrix, gate and up in another, and LongRoPE.
// Keys and defaults as in Hugging Face transformers, models/phi3.
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
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
  set_windows(c, config, read_window(config, 0), [](int64_t) { return true; });
  return c;
}

}  // namespace

const Architecture phi3 = {.name = "Phi3ForCausalLM", .model_type = "phi3", .configure = configure};

}  // namespace bitwright::architectures
