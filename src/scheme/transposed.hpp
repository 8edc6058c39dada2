#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// The scheme of a matrix's transpose: groups along one axis lie along the other. For schemes whose groupings are of
/// kind tensor or axis, nested ones included; own code asks for no other.
Scheme transposed(const Scheme& scheme);
/// A matrix's transpose, decoding to the same bits.
QuantizedTensor transposed(const QuantizedTensor& matrix);

}  // namespace bitwright
