#pragma once

#include <optional>

#include "container/container.hpp"

namespace bitwright {

// A large tensor is quantized, written and read back by pieces of some rows, its shape folded to [rows, columns], so
// that memory does not grow with it. The pieces depend on nothing but the tensor: neither on memory nor on threads.

/// A piece's shape: [end - begin, columns].
StoredTensor rows_of(const StoredTensor& whole, int64_t begin, int64_t end);

/// The fewest rows whose multiples are quantized by themselves as they are within the tensor, and packed to whole
/// bytes. Nothing: groups reach across rows, or parameters are quantized together.
std::optional<int64_t> row_step(const Scheme& scheme, const Shape& shape);

struct RowRange {
  int64_t begin, end;
};
/// The pieces of a tensor that `container` will store or stores; one if it cannot be taken apart.
std::vector<RowRange> row_pieces(const Container& container, const StoredTensor& tensor);

/// Rows of the folded shape.
int64_t row_count(const Shape& shape);

}  // namespace bitwright
