#pragma once

#include <span>

#include "kernels/kernel_level.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Is it a scheme of blocks whose scales are found by a search: GGUF's K-quants and IQ4?
bool is_block_scheme(const Scheme& scheme);

/// The codes, scales and minimums of least squared error that the search finds. importance: weights of the squared
/// errors, one a column; empty: all 1. Every level and any number of threads give the same bits. Rows must be whole
/// blocks. Throws Error{"not-finite"}.
QuantizedTensor search_blocks(const Scheme& scheme, const Shape& shape, WeightView weight,
                              std::span<const float> importance = {}, const KernelLevel& level = active_kernel_level());

}  // namespace bitwright
