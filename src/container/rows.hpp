#pragma once

#include <optional>

#include "container/container.hpp"

namespace bitwright {

// A large tensor is quantized, written and read back by pieces of some rows, its shape folded to [rows, columns], so
// that memory does not grow with it. The pieces depend on nothing but the tensor: neither on memory nor on threads.

/// A piece's shape: [end - begin, columns]. `begin` is a multiple of 32.
StoredTensor rows_of(const StoredTensor& whole, int64_t begin, int64_t end);

/// The fewest rows whose multiples are quantized by themselves as they are within the tensor, and packed to whole
/// bytes. Nothing: groups reach across rows, or parameters are quantized together.
std::optional<int64_t> row_step(const Scheme& scheme, const Shape& shape);

struct RowRange {
  int64_t begin, end;
};
std::vector<RowRange> row_pieces(const StoredTensor& tensor);  ///< one if it cannot be taken apart
/// The pieces of a tensor that `container` will store or stores; one if it cannot be taken apart.
std::vector<RowRange> row_pieces(const Container& container, const StoredTensor& tensor);
/// Such pieces cut where a matrix of a stack ends, as weights are quantized by the importance of each matrix.
std::vector<RowRange> within_matrices(std::span<const RowRange> pieces, const Shape& shape);

/// Where the bytes of a piece's array belong in the array of the whole: `runs` times `run` bytes, `stride` apart.
struct Placement {
  uint64_t offset, run, stride, runs;
};
/// whole, before, piece: the same array of the whole tensor, of the rows before the piece, and of the piece.
/// An array that does not depend on rows lies at 0 in each piece.
Placement place(const ArraySpec& whole, const ArraySpec& before, const ArraySpec& piece);

/// Rows of the folded shape.
int64_t row_count(const Shape& shape);

}  // namespace bitwright
