#pragma once

#include <span>
#include <vector>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// [rows, columns] elements of `size` bytes as [columns, rows].
std::vector<std::byte> transposed(std::span<const std::byte> elements, int64_t rows, int64_t columns, size_t size);
/// The scheme of a matrix's transpose: groups along one axis lie along the other. For schemes whose groupings are of
/// kind tensor or axis, nested ones included; own code asks for no other.
Scheme transposed(const Scheme& scheme);
/// A matrix's transpose, decoding to the same bits.
QuantizedTensor transposed(const QuantizedTensor& matrix);

}  // namespace bitwright
