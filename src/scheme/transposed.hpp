#pragma once

#include <span>
#include <vector>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// [rows, columns] elements of `size` bytes as [columns, rows].
std::vector<std::byte> transposed(std::span<const std::byte> elements, int64_t rows, int64_t columns, size_t size);
/// Has a matrix of this scheme a transpose that decodes to the same bits: do all groups, nested ones included, lie
/// along one axis or span the whole?
bool can_transpose(const Scheme& scheme);
/// The scheme of a matrix's transpose: groups along one axis lie along the other. Needs can_transpose().
Scheme transposed(const Scheme& scheme);
/// A matrix's transpose, decoding to the same bits. Needs can_transpose().
QuantizedTensor transposed(const QuantizedTensor& matrix);

}  // namespace bitwright
