#pragma once

#include "model/gguf_mapping.hpp"
#include "model/standard_config.hpp"

namespace bitwright {

/// What Gemma 2 and 3 have in common: embeddings times sqrt(hidden), norms that multiply by 1 + weight, four of them a
/// layer, gated GELU, attention scaled by query_pre_attn_scalar. Without rope, windows and caps.
ModelConfig read_gemma(const ConfigReader& config, StandardKeys keys);

/// In GGUF norms are stored with the 1 added.
extern const std::span<const GgufTensor> kGgufGemmaTensors;
/// query_pre_attn_scalar is in no GGUF key: it is the head size, but in the largest model, told by its layers, hidden /
/// heads.
void complete_gguf_gemma(const GgufFacts& facts, Json& config, int64_t layers_of_largest);

}  // namespace bitwright
