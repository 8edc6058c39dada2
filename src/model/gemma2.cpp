// Gemma 2 (arXiv:2408.00118): norms before and after each part, a window in every other layer, soft caps on attention
// scores and logits. Keys and defaults as in Hugging Face transformers, models/gemma2.
#include <array>
#include <nlohmann/json.hpp>

#include "model/architectures.hpp"
#include "model/gemma.hpp"
#include "model/gguf_mapping.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  ModelConfig c = read_gemma(config, {.kv_heads_default = 4, .context_default = 8192});
  set_rope(c, config, {});
  c.attention_cap = read_cap(config, "attn_logit_softcapping", 50);
  c.logit_cap = read_cap(config, "final_logit_softcapping", 30);
  set_windows(c, config, read_window(config, 4096), [](int64_t layer) { return layer % 2 == 0; });
  return c;
}

constexpr auto kGgufKeys = std::to_array<GgufKey>({
    {"attn_logit_softcapping", "attn_logit_softcapping"},
    {"final_logit_softcapping", "final_logit_softcapping"},
    {"attention.sliding_window", "sliding_window"},
});

void complete_gguf(const GgufFacts& facts, Json& config) {
  set_gguf_rope(facts, config);
  complete_gguf_gemma(facts, config, 46);
}

const GgufMapping kGguf = {.architecture = "gemma2",
                           .keys = kGgufLlamaKeys,
                           .own_keys = kGgufKeys,
                           .tensors = kGgufGemmaTensors,
                           .shared_tensors = kGgufLlamaTensors,
                           .complete = complete_gguf,
                           .windows = true,
                           .activation = Activation::gelu_tanh};

}  // namespace

const Architecture gemma2 = {
    .name = "Gemma2ForCausalLM", .model_type = "gemma2", .configure = configure, .gguf = &kGguf};

}  // namespace bitwright::architectures
