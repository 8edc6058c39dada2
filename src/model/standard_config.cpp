#include "model/standard_config.hpp"

#include <algorithm>
#include <cmath>
#include <string_view>

namespace bitwright {
namespace {

// Beyond any model, and small enough that no product of them passes 64 bits.
constexpr int64_t kMostLayers = 1 << 12, kMostHeads = 1 << 12, kWidest = 1 << 20, kMostWords = 1 << 24;
constexpr double kLargestCap = 1e6;

struct NamedActivation {
  std::string_view name;
  Activation activation;
};
/// As transformers names them (activations.py); several names of one function.
constexpr NamedActivation kActivations[] = {
    {"silu", Activation::silu},          {"swish", Activation::silu},
    {"gelu", Activation::gelu},          {"gelu_python", Activation::gelu},
    {"gelu_new", Activation::gelu_tanh}, {"gelu_pytorch_tanh", Activation::gelu_tanh},
    {"gelu_fast", Activation::gelu_tanh}};

Activation read_activation(const ConfigReader& config, const StandardKeys& keys) {
  const std::string name = config.text(keys.activation, keys.activation_default);
  const auto* const found = std::ranges::find(kActivations, name, &NamedActivation::name);
  if (found == std::end(kActivations)) config.unsupported(keys.activation, "which is not supported");
  return found->activation;
}

int64_t dimension(const ConfigReader& config, const char* key, int64_t high, int64_t fallback) {
  return config.integer(key, 1, high, fallback == 0 ? std::nullopt : std::optional(fallback));
}

int64_t read_head_size(const ConfigReader& config, const StandardKeys& keys, const ModelConfig& c) {
  if (config.find("head_dim") == nullptr && keys.head_size_default == 0 && c.hidden % c.heads != 0)
    config.fail(keys.heads, "which does not divide the hidden size " + std::to_string(c.hidden));
  const int64_t fallback = keys.head_size_default != 0 ? keys.head_size_default : c.hidden / c.heads;
  return config.integer("head_dim", 1, kWidest / c.heads, fallback);
}

}  // namespace

ModelConfig read_dimensions(const ConfigReader& config, const StandardKeys& keys) {
  ModelConfig c;
  c.layers = dimension(config, keys.layers, kMostLayers, keys.layers_default);
  c.hidden = dimension(config, keys.hidden, kWidest, keys.hidden_default);
  c.heads = dimension(config, keys.heads, kMostHeads, keys.heads_default);
  const int64_t kv_default = keys.kv_heads_default != 0 ? keys.kv_heads_default : c.heads;
  c.kv_heads = config.integer("num_key_value_heads", 1, kMostHeads, kv_default);
  if (c.heads % c.kv_heads != 0)
    config.fail("num_key_value_heads", "which does not divide the number of heads, " + std::to_string(c.heads));
  c.head_size = read_head_size(config, keys, c);
  c.feed_forward = dimension(config, keys.feed_forward, kWidest, keys.feed_forward_default);
  c.vocabulary = dimension(config, "vocab_size", kMostWords, keys.vocabulary_default);
  c.context = config.integer(keys.context, 1, kMostWords, keys.context_default);
  c.tied_head = config.boolean("tie_word_embeddings", keys.tied_default);
  c.norm_epsilon = static_cast<float>(config.positive(keys.epsilon, 1, keys.epsilon_default));
  c.attention_scale = 1 / std::sqrt(static_cast<float>(c.head_size));
  c.activation = read_activation(config, keys);
  c.kinds.resize(static_cast<size_t>(c.layers));
  return c;
}

void set_rope(ModelConfig& c, const ConfigReader& config, const RopeKeys& keys) {
  c.ropes = {read_rope(config, c.head_size, c.context, keys)};
  c.context = std::clamp(c.ropes[0].reach, c.context, std::max(c.context, kMostWords));
}

void set_llama_places(ModelConfig& c) {
  TensorPlaces& places = c.places;
  places.q.name = "self_attn.q_proj";
  places.k.name = "self_attn.k_proj";
  places.v.name = "self_attn.v_proj";
  places.o.name = "self_attn.o_proj";
  places.gate.name = "mlp.gate_proj";
  places.up.name = "mlp.up_proj";
  places.down.name = "mlp.down_proj";
}

ModelConfig read_llama(const ConfigReader& config, const StandardKeys& keys, const RopeKeys& rope) {
  ModelConfig c = read_dimensions(config, keys);
  set_rope(c, config, rope);
  set_llama_places(c);
  return c;
}

void set_attention_bias(ModelConfig& c, bool bias) {
  for (MatrixPlace* place : {&c.places.q, &c.places.k, &c.places.v, &c.places.o}) place->bias = bias;
}

void set_fused_qkv(ModelConfig& c, const MatrixPlace& fused) {
  const int64_t q = c.heads * c.head_size, kv = c.kv_heads * c.head_size;
  const auto part = [&](int64_t first, int64_t rows) {
    MatrixPlace place = fused;
    place.stored = q + 2 * kv;
    place.first = first;
    place.run = rows;
    place.step = place.stored;
    return place;
  };
  c.places.q = part(0, q);
  c.places.k = part(q, kv);
  c.places.v = part(q + kv, kv);
}

int64_t read_window(const ConfigReader& config, int64_t missing) {
  return config.integer("sliding_window", 1, kMostWords, config.has("sliding_window") ? 0 : missing);
}

void set_windows(ModelConfig& c, const ConfigReader& config, int64_t window,
                 const std::function<bool(int64_t layer)>& slides) {
  const std::vector<std::string> types = config.texts("layer_types");
  if (config.find("layer_types") != nullptr && types.size() != c.kinds.size())
    config.fail("layer_types", "not one for each of the " + std::to_string(c.layers) + " layers");
  for (size_t i = 0; i < c.kinds.size(); ++i) {
    if (!types.empty() && types[i] != "sliding_attention" && types[i] != "full_attention")
      config.unsupported("layer_types", "only sliding_attention and full_attention are supported");
    const bool sliding = types.empty() ? slides(static_cast<int64_t>(i)) : types[i] == "sliding_attention";
    if (!sliding) continue;
    if (!types.empty() && window == 0) config.fail("sliding_window", "is missing, some layer_types slide");
    c.kinds[i].window = window;
  }
}

float read_cap(const ConfigReader& config, const char* key, double missing) {
  if (config.has(key) && config.find(key) == nullptr) return 0;
  if (!config.has(key) && missing == 0) return 0;
  return static_cast<float>(config.positive(key, kLargestCap, missing));
}

}  // namespace bitwright
