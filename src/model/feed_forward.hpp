#pragma once

#include <initializer_list>

#include "model/layer.hpp"

namespace bitwright {

/// y = W x + b for `tokens` rows, x and y quantized where the layer's are. Each row's bits do not depend on the others
/// (but see ActivationQuantizer::apply).
void apply(const Linear& linear, const float* x, size_t tokens, float* y);

/// Tells the observer, if there is one, that these will be applied to x.
void observe(const InputObserver* observer, std::initializer_list<const Linear*> readers, const float* x,
             size_t tokens);

/// out = what the layer's feed-forward network or experts make of x; both [tokens, hidden].
void run_feed_forward(const Layer& layer, const ModelConfig& config, const float* x, size_t tokens, float* out,
                      const InputObserver* observer);

}  // namespace bitwright
