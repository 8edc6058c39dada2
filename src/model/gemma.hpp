#pragma once

#include "model/standard_config.hpp"

namespace bitwright {

/// What Gemma 2 and 3 have in common: embeddings times sqrt(hidden), norms that multiply by 1 + weight, four of them a
/// layer, gated GELU, attention scaled by query_pre_attn_scalar. Without rope, windows and caps.
ModelConfig read_gemma(const ConfigReader& config, StandardKeys keys);

}  // namespace bitwright
