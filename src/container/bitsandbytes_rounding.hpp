#pragma once

#include <cstdint>
#include <span>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

// How bitsandbytes rounds on CUDA, where nearly all of its users quantize: csrc/kernels.cu with IEEE arithmetic (its
// own build divides approximately: a value within an ulp of a threshold may go the other way). Its CPU backend differs
// in three ways; scheme/'s encode is that one: thresholds are the exact midpoints, zero blocks get the code of 0, and a
// short last block is divided by its absmax instead of multiplied by the reciprocal.

/// nf4 or fp4 in flat blocks, absmax in f32 or quantized again by the dynamic map around its mean. Throws
/// Error{"not-finite"} with the position, Error{"bad-tensor"} for a weight that is not f32, f16 or bf16.
QuantizedTensor encode_bitsandbytes4(const Scheme& scheme, const Shape& shape, WeightView weight);

/// LLM.int8: rows of int8 codes and their absmax. The weight is rounded to f16 first, as Int8Params does; throws
/// Error{"not-finite"} where it is too large for that.
QuantizedTensor encode_bitsandbytes8(const Scheme& scheme, const Shape& shape, WeightView weight);

/// The code of the dynamic map that CUDA's search finds for a value in [-1, 1]; NaN (of zero blocks) as it comes.
uint8_t round_to_dynamic8(float value);

/// One row by int8_vectorwise_quant; returns its absmax. Codes: round(value * (1 / absmax * 127)), each step in f32.
/// threshold > 0: a value that reaches it is an outlier, which counts for nothing and becomes 0.
float round_int8_row(std::span<const float> row, float threshold, std::span<int8_t> codes);

}  // namespace bitwright
