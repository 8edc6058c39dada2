#pragma once

#include <string>

#include "base/json.hpp"

namespace bitwright {

/// The README.md of a quantized model, from the record that quantization_metadata.json holds.
std::string model_card(const OrderedJson& record);

/// "close to the original" … "much worse than the original", from the rise in perplexity (1.05: 5 % more).
std::string quality_sentence(double perplexity_ratio, double kl_mean);

}  // namespace bitwright
