#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace bitwright {

/// How a matrix of codes is cut into parts of R neighbouring rows, of which each word takes one code: word (r, c) holds
/// those of rows r, r + R, r + 2R … of column c. What the last part lacks is 0.
struct RowParts {
  int bits;               ///< of a code
  int parts;              ///< codes a word
  bool first_high;        ///< is the first part in the highest bits?
  size_t word_bytes = 1;  ///< 1 or 4
  int shift(int part) const { return bits * (first_high ? parts - 1 - part : part); }
  int64_t packed_rows(int64_t rows) const { return rows / parts + (rows % parts != 0 ? 1 : 0); }
};

/// codes: rows * columns, one a byte, of `bits` bits. Out: packed_rows(rows) * columns words, row-major, little-endian.
/// In parallel.
std::vector<std::byte> pack_row_parts(const RowParts& parts, std::span<const std::byte> codes, int64_t rows,
                                      int64_t columns);
/// The inverse. packed: packed_rows(rows) * columns words.
std::vector<std::byte> unpack_row_parts(const RowParts& parts, std::span<const std::byte> packed, int64_t rows,
                                        int64_t columns);

}  // namespace bitwright
