// Mistral (arXiv:2310.06825): Llama in which each query sees a window of positions. Keys and defaults as in Hugging
// Face transformers, models/mistral.
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  config.only("attention_bias", false);
  ModelConfig c = read_llama(config, {.kv_heads_default = 8, .context_default = 131072}, {});
  set_one_window(c, config, 4096);
  return c;
}

}  // namespace

const Architecture mistral = {
    .name = "MistralForCausalLM", .model_type = "mistral", .configure = configure, .gguf = &kGgufLlama};

}  // namespace bitwright::architectures
