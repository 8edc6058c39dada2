#pragma once

#include "model/config_reader.hpp"
#include "model/model_config.hpp"

namespace bitwright {

/// How an architecture's config.json speaks of rotary positions.
struct RopeKeys {
  const char* theta = "rope_theta";
  double theta_default = 10000;
  const char* partial = nullptr;  ///< the part of a head that turns; null: all of it, and any other is refused
  double partial_default = 1;
  const char* kind = nullptr;  ///< the key of one kind of layer in rope_parameters, where each kind has its own
  bool scaled = true;          ///< false: rope_scaling is about other layers
};

/// From rope_parameters (transformers 5), or rope_scaling and the keys beside it. `context`: max_position_embeddings.
/// Types: default, linear, dynamic, llama3, yarn, longrope. Throws Error{"unsupported-config"} on any other.
Rope read_rope(const ConfigReader& config, int64_t head_size, int64_t context, const RopeKeys& keys);

}  // namespace bitwright
