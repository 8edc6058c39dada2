#pragma once

#include "model/layer.hpp"

namespace bitwright {

/// y = W x + b for `tokens` rows. Each row's bits do not depend on the others.
void apply(const Linear& linear, const float* x, size_t tokens, float* y);

/// out = what the layer's feed-forward network or experts make of x; both [tokens, hidden].
void run_feed_forward(const Layer& layer, const ModelConfig& config, const float* x, size_t tokens, float* out);

}  // namespace bitwright
