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

/// Likewise, but scales and offsets stay as they are stored where their groups lie within rows, nested ones too: then
/// the scheme is the tensor's own. one_matrix: the rows are of one matrix, so what belongs to all of it stays.
std::optional<QuantizedTensor> rows_as_stored(const QuantizedTensor& tensor, std::span<const int64_t> rows,
                                              bool one_matrix);
/// The scheme of what take_rows or rows_as_stored give of a tensor of this scheme and shape; nothing where they do.
std::optional<Scheme> scheme_of_rows(const Scheme& scheme, const Shape& shape, bool one_matrix);

/// Matrices of one scheme and width, one below the other. Needs parameters whose groups lie within rows.
QuantizedTensor stacked(std::span<const QuantizedTensor> parts);

}  // namespace bitwright
