#pragma once

#include <string>

#include "base/json.hpp"

namespace bitwright {

/// The README.md of a quantized or converted model, from the record that quantization_metadata.json holds.
std::string model_card(const OrderedJson& record);

/// From "practically equal to the original" to "much worse", by perplexity over the original's and mean KL divergence.
std::string quality_sentence(double perplexity_ratio, double kl_mean);

}  // namespace bitwright
