// Gemma 3 (arXiv:2503.19786): Gemma 2 with norms on queries and keys instead of soft caps, five layers with a window to
// one without, each kind with its own rotary positions. The text model alone, or the language model of one that sees
// images too. Keys and defaults as in Hugging Face transformers, models/gemma3.
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "model/architectures.hpp"
#include "model/gemma.hpp"
#include "model/gguf_mapping.hpp"

namespace bitwright::architectures {
namespace {

ModelConfig configure_text(const ConfigReader& config) {
  ModelConfig c = read_gemma(config, {.hidden_default = 2304,
                                      .heads_default = 8,
                                      .layers_default = 26,
                                      .feed_forward_default = 9216,
                                      .vocabulary_default = 262208,
                                      .kv_heads_default = 4,
                                      .context_default = 131072});
  c.ropes = {read_rope(config, c.head_size, c.context, {.theta_default = 1e6, .kind = "full_attention"}),
             read_rope(config, c.head_size, c.context,
                       {.theta = "rope_local_base_freq", .kind = "sliding_attention", .scaled = false})};
  c.places.q_norm = "self_attn.q_norm";
  c.places.k_norm = "self_attn.k_norm";
  c.attention_cap = read_cap(config, "attn_logit_softcapping", 0);
  c.logit_cap = read_cap(config, "final_logit_softcapping", 0);
  const int64_t pattern = config.integer("sliding_window_pattern", 1, 1 << 20, 6);
  set_windows(c, config, read_window(config, 4096), [&](int64_t layer) { return (layer + 1) % pattern != 0; });
  for (LayerKind& kind : c.kinds) kind.rope = kind.window != 0 ? 1 : 0;
  return c;
}

ModelConfig configure(const Json& json, const std::string& where) { return configure_text(ConfigReader(json, where)); }

ModelConfig configure_language_model(const Json& json, const std::string& where) {
  const ConfigReader config(json, where);
  const std::optional<ConfigReader> text = config.object("text_config");
  if (!text) config.fail("text_config", "is missing");
  ModelConfig c = configure_text(*text);
  c.tied_head = config.boolean("tie_word_embeddings", c.tied_head);
  c.places.other_modules = {"vision_tower", "multi_modal_projector"};
  return c;
}

constexpr auto kGgufKeys = std::to_array<GgufKey>({{"final_logit_softcapping", "final_logit_softcapping"}});

void complete_gguf(const GgufFacts& facts, Json& config) {
  set_gguf_window(facts, config);
  set_gguf_rope(facts, config);
  config["sliding_window_pattern"] = facts.integer("attention.sliding_window_pattern", 1, 1 << 20, 6);
  config["rope_local_base_freq"] = facts.number("rope.freq_base_swa", 10000);
  complete_gguf_gemma(facts, config, 62);
}

}  // namespace

const Architecture gemma3 = {
    .name = "Gemma3ForCausalLM", .model_type = "gemma3_text", .configure = configure, .gguf = &kGgufGemma3};
const Architecture gemma3_with_images = {.name = "Gemma3ForConditionalGeneration",
                                         .model_type = "gemma3",
                                         .configure = configure_language_model,
                                         .gguf = &kGgufGemma3};

}  // namespace bitwright::architectures

namespace bitwright {

const GgufMapping kGgufGemma3 = {.architecture = "gemma3",
                                 .keys = kGgufLlamaKeys,
                                 .own_keys = architectures::kGgufKeys,
                                 .tensors = kGgufGemmaTensors,
                                 .shared_tensors = kGgufLlamaTensors,
                                 .complete = architectures::complete_gguf,
                                 .windows = true,
                                 .activation = Activation::gelu_tanh};

}  // namespace bitwright
