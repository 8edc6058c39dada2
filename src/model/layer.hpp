#pragma once

#include <variant>

#include "model/weights.hpp"

namespace bitwright {

/// A norm's parameters. RMSNorm has no bias; no weight: there is no such norm.
struct Norm {
  std::vector<float> weight{}, bias{};
  bool empty() const { return weight.empty(); }
  uint64_t bytes() const { return (weight.size() + bias.size()) * sizeof(float); }
};

/// down(activation(gate x) * up x), or down(activation(up x)) where there is no gate.
struct FeedForward {
  std::optional<Linear> gate;
  Linear up, down;
  uint64_t bytes() const { return (gate ? gate->bytes() : 0) + up.bytes() + down.bytes(); }
};

/// Experts of which each token uses those with the largest products with the router's rows.
struct Experts {
  Linear router;
  std::vector<FeedForward> experts;
  uint64_t bytes() const;
};

struct Layer {
  LayerKind kind;
  Norm attention_norm, post_attention_norm, feed_forward_norm, post_feed_forward_norm;
  Norm q_norm, k_norm;  ///< of one head
  Linear q, k, v, o;
  std::variant<FeedForward, Experts> feed_forward;
  uint64_t bytes() const;  ///< in memory
};

/// NAME.weight (with the configured offset) and, of a LayerNorm, NAME.bias; empty for an empty name.
Norm load_norm(WeightReader& reader, const ModelConfig& config, const std::string& base, const std::string& name,
               int64_t size);
Layer load_layer(WeightReader& reader, const ModelConfig& config, int64_t index);

}  // namespace bitwright
