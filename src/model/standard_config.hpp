#pragma once

#include <functional>

#include "model/config_reader.hpp"
#include "model/model_config.hpp"
#include "model/rope.hpp"

namespace bitwright {

// What the architectures' rows share. Most of them are Llama with differences, and so are their keys and tensor names.

/// Keys and defaults in which architectures differ. A default of 0: the key must be there.
struct StandardKeys {
  const char* layers = "num_hidden_layers";
  const char* hidden = "hidden_size";
  const char* heads = "num_attention_heads";
  const char* feed_forward = "intermediate_size";
  const char* context = "max_position_embeddings";
  const char* epsilon = "rms_norm_eps";
  const char* activation = "hidden_act";
  int64_t hidden_default = 0, heads_default = 0, layers_default = 0, feed_forward_default = 0, vocabulary_default = 0;
  int64_t kv_heads_default = 0;   ///< 0: as many as heads
  int64_t head_size_default = 0;  ///< 0: hidden / heads
  int64_t context_default = 2048;
  double epsilon_default = 1e-6;
  const char* activation_default = "silu";
  bool tied_default = false;
};

/// Dimensions, norms' epsilon, activation, head; attention scaled by 1 / sqrt(head size); every layer of the same kind.
ModelConfig read_dimensions(const ConfigReader& config, const StandardKeys& keys);
/// The one rope of all layers; context grows to what it was stretched to.
void set_rope(ModelConfig& c, const ConfigReader& config, const RopeKeys& keys);
/// Projections called as Llama's.
void set_llama_places(ModelConfig& c);
/// All of the above: a model of Llama's shape.
ModelConfig read_llama(const ConfigReader& config, const StandardKeys& keys, const RopeKeys& rope);

/// attention_bias: q, k, v and o have biases.
void set_attention_bias(ModelConfig& c, bool bias);
/// NAME.weight holds q above k above v; NAME.bias likewise.
void set_fused_qkv(ModelConfig& c, const MatrixPlace& fused);
/// The key's window, or `missing` if there is no such key; 0 if it is null.
int64_t read_window(const ConfigReader& config, int64_t missing);
/// The window for the layers that layer_types calls sliding_attention, or without that key for those that `slides`.
void set_windows(ModelConfig& c, const ConfigReader& config, int64_t window,
                 const std::function<bool(int64_t layer)>& slides);
/// A soft cap: `missing` if there is no such key, 0 (none) if it is null.
float read_cap(const ConfigReader& config, const char* key, double missing);

}  // namespace bitwright
