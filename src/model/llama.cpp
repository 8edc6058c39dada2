// Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Keys, defaults and tensor names as in Hugging Face
// transformers, models/llama (LlamaConfig, LlamaForCausalLM).
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
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

}  // namespace

const Architecture llama = {.name = "LlamaForCausalLM", .model_type = "llama", .configure = configure};

}  // namespace bitwright::architectures
