#pragma once

#include <optional>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// For each tensor of the recipe the largest magnitude among those that engines make one matrix of with it: q, k and v;
/// gate and up. Of tensors with one scale for the whole of them (NVFP4), which must then agree: vLLM takes the largest
/// of a dense layer and the first of an expert, SGLang likewise. None: nothing is fused with it.
/// Throws Error{"not-finite"}.
std::vector<std::optional<float>> fused_magnitudes(const Checkpoint& source, const Recipe& recipe);

}  // namespace bitwright
