#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// A weight as compressed-tensors rounds it (calculate_qparams over minima and maxima, then quantize): every step in
/// the weight's own type, so that scales and codes of bf16 and f16 weights are the library's bit for bit; in f32 where
/// the scheme's scales are of another type. Integers with and without zero points, e4m3 per tensor, row, group or
/// block, NVFP4, MXFP4, MXFP8.
/// Throws Error{"not-finite"} with the position, Error{"scale-overflow"}, Error{"bad-tensor"} for a weight that is not
/// f32, f16 or bf16.
QuantizedTensor encode_compressed_tensors(const Scheme& scheme, const Shape& shape, WeightView weight);
/// NVFP4's global scale for the larger of `largest` and what is in the weight, as llm-compressor shares it.
QuantizedTensor encode_compressed_tensors_fused(const Scheme& scheme, const Shape& shape, WeightView weight,
                                                float largest);

}  // namespace bitwright
