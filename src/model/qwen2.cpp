// Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k and v; where it is asked for, a window in the layers
// from max_window_layers on. Keys and defaults as in Hugging Face transformers, models/qwen2.
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  ModelConfig c = read_llama(config, {.kv_heads_default = 32, .context_default = 32768}, {});
  for (MatrixPlace* place : {&c.places.q, &c.places.k, &c.places.v}) place->bias = true;
  const int64_t window = config.boolean("use_sliding_window", false) ? read_window(config, 4096) : 0;
  const int64_t full = config.integer("max_window_layers", 0, 1 << 20, 28);
  set_windows(c, config, window, [&](int64_t layer) { return layer >= full; });
  return c;
}

const GgufMapping kGguf = {.architecture = "qwen2",
                           .keys = kGgufLlamaKeys,
                           .tensors = kGgufLlamaTensors,
                           .complete = set_gguf_rope,
                           .biases = true};

}  // namespace

const Architecture qwen2 = {.name = "Qwen2ForCausalLM", .model_type = "qwen2", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
