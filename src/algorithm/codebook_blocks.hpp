#pragma once

#include <span>

#include "kernels/kernel_level.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Is it a scheme of GGUF whose neighbours are an entry of a codebook together, and that is searched here: IQ2, IQ3?
bool is_codebook_scheme(const Scheme& scheme);

/// The entries, signs and scales of least squared error that the search finds; all else as search_blocks has it.
QuantizedTensor search_codebooks(const Scheme& scheme, const Shape& shape, WeightView weight,
                                 std::span<const float> importance, const KernelLevel& level);

}  // namespace bitwright
