#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace bitwright {

// Matrices whose codes are packed along a row into words of 32 bits and whose words are stored transposed: GPTQ, AWQ,
// MXFP4. All sizes are in elements; spans are of bytes, at any alignment.

/// A way of packing neighbours of a row. Both work on 32 codes at a time, which fill `bits` words; codes: one a byte.
struct WordPacking {
  void (*pack)(std::span<const std::byte> codes, int bits, std::span<std::byte> words);
  void (*unpack)(std::span<const std::byte> words, int bits, std::span<std::byte> codes);
};
/// One dense stream, least significant bits first.
extern const WordPacking kDensePacking;
/// GPTQModel's "planar": the codes' low bits together, then the rest: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1
/// bits; a part of w bits has w words, word i with the codes from i * 32 / w on.
extern const WordPacking kPlanarPacking;

/// codes [rows, columns], columns a multiple of 32 -> words [columns / 32 * bits, rows]. In parallel.
/// turned: the bits that are stored the other way round in each code.
std::vector<std::byte> pack_transposed(const WordPacking& packing, int bits, std::span<const std::byte> codes,
                                       size_t rows, size_t columns, std::byte turned = {});
/// The inverse.
std::vector<std::byte> unpack_transposed(const WordPacking& packing, int bits, std::span<const std::byte> words,
                                         size_t rows, size_t columns, std::byte turned = {});

/// Which of eight rows lies where in a word, the lowest bits first.
using RowOrder = std::array<size_t, 8>;
inline constexpr RowOrder kAwqOrder = {0, 2, 4, 6, 1, 3, 5, 7}, kPlainOrder = {0, 1, 2, 3, 4, 5, 6, 7};

/// codes [matrices, rows, columns] of 4 bits, rows a multiple of 8 -> words [matrices, columns, rows / 8]: word [m, k,
/// c] holds the codes of rows 8c + order[i] at bits 4i. In parallel.
std::vector<std::byte> pack_interleaved(const RowOrder& order, std::span<const std::byte> codes, size_t matrices,
                                        size_t rows, size_t columns);
std::vector<std::byte> unpack_interleaved(const RowOrder& order, std::span<const std::byte> words, size_t matrices,
                                          size_t rows, size_t columns);

/// from [rows, columns] of elements of 1, 2 or 4 bytes -> [columns, rows].
std::vector<std::byte> transposed_bytes(std::span<const std::byte> from, size_t rows, size_t columns, size_t element);

}  // namespace bitwright
