#pragma once

#include <cstdint>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

// Integers as PyTorch and torchao round them, bit for bit: values are multiplied by the scale's reciprocal, where
// `encode_value` divides.
// Source: PyTorch 1.13 (quantize_per_tensor, fake_quantize, observers); torchao 36027d8, quant_primitives.py.

/// The codes in use: quant_min, quant_max.
struct AffineRange {
  int64_t low, high;
};
struct AffineParameters {
  float scale;
  int64_t zero;
};

/// Throws Error{"bad-scheme"} unless the range is one of `element`'s and the zero point lies in it.
void check_affine(const ElementType& element, const AffineRange& range, int64_t zero);

/// clamp(rint(value * (1 / scale)) + zero); what is no number, or beyond 32 bits, becomes the lowest code.
int64_t quantize_affine(float value, const AffineParameters& parameters, const AffineRange& range);
/// The same with a zero point that is no integer, added before rounding (quint4x2, torchao's tinygemm).
int64_t quantize_float_zero(float value, float scale, float zero, const AffineRange& range);

enum class AffineMapping : uint8_t {
  asymmetric,             ///< all of [low, high], widened to hold 0
  symmetric,              ///< the larger magnitude over half the codes: 127.5 of 8 bits
  symmetric_no_clipping,  ///< the larger of low over the lowest code and high over the highest
};
/// least: what a scale is at least. observer, torch's: 2^-23; torchao's: the smallest normal number.
AffineParameters choose_affine(Range values, AffineMapping mapping, const AffineRange& range, float least);

}  // namespace bitwright
