#pragma once

#include <optional>
#include <span>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// The matrix of these rows of `tensor`, in this order. A tensor of more than two dimensions counts as one matrix
/// [all leading dimensions, last]. Decodes to the same bits as the rows do within `tensor`; codes stay as they are,
/// scales and offsets become plain f32.
/// Nothing where groups neither lie within a row nor hold whole rows, or the codes are block codes: then the rows can
/// only be had as floats. Each row is in range.
std::optional<QuantizedTensor> take_rows(const QuantizedTensor& tensor, std::span<const int64_t> rows);

}  // namespace bitwright
