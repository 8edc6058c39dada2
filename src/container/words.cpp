#include "container/words.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kWord = 4, kStretch = 32;  ///< bytes of a word; codes that fill whole words at any width
constexpr size_t kTileRows = 64;            ///< neighbours in what is written: four lines of cache
constexpr size_t kTileCodes = 512;          ///< of a row
constexpr size_t kBesides = 16;  ///< words between rows of a tile, which at powers of two share few cache lines

/// to[c * to_stride + r] = from[r * from_stride + c]; strides in elements.
template <class T>
void transpose_simply(const std::byte* from, size_t rows, size_t columns, size_t from_stride, std::byte* to,
                      size_t to_stride) {
  for (size_t c = 0; c < columns; ++c)
    for (size_t r = 0; r < rows; ++r)
      std::memcpy(to + (c * to_stride + r) * sizeof(T), from + (r * from_stride + c) * sizeof(T), sizeof(T));
}

using Words4 = uint32_t __attribute__((vector_size(16)));

/// Four rows of four words, in registers.
void transpose_square(const std::byte* from, size_t from_stride, std::byte* to, size_t to_stride) {
  std::array<Words4, 4> row;
  for (size_t i = 0; i < 4; ++i) std::memcpy(&row.at(i), from + i * from_stride * kWord, sizeof(Words4));
  const Words4 a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Words4 b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Words4 c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Words4 d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  row = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
         __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (size_t i = 0; i < 4; ++i) std::memcpy(to + i * to_stride * kWord, &row.at(i), sizeof(Words4));
}

void transpose_words(const std::byte* from, size_t rows, size_t columns, size_t from_stride, std::byte* to,
                     size_t to_stride) {
  const size_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  const auto square = [&](size_t r, size_t c) {
    transpose_square(from + (r * from_stride + c) * kWord, from_stride, to + (c * to_stride + r) * kWord, to_stride);
  };
  // Eight columns at a time: at powers of two the cache holds few rows of what is written, but those fill up.
  for (size_t begin = 0; begin < whole_columns; begin += 8)
    for (size_t r = 0; r < whole_rows; r += 4)
      for (size_t c = begin; c < std::min(begin + 8, whole_columns); c += 4) square(r, c);
  transpose_simply<uint32_t>(from + whole_columns * kWord, whole_rows, columns - whole_columns, from_stride,
                             to + whole_columns * to_stride * kWord, to_stride);
  transpose_simply<uint32_t>(from + whole_rows * from_stride * kWord, rows - whole_rows, columns, from_stride,
                             to + whole_rows * kWord, to_stride);
}

/// visit(first, count) for the tiles of [0, total).
template <class Visit>
void for_each_tile(size_t total, size_t tile, const Visit& visit) {
  for (size_t begin = 0; begin < total; begin += tile) visit(begin, std::min(tile, total - begin));
}

/// What lies far apart is asked for before its turn: rows at powers of two are beyond what the processor foresees.
void prefetch(const std::byte* from, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + i);
}

// ---- planar ----

uint32_t load_word(const std::byte* at) {
  uint32_t word = 0;
  std::memcpy(&word, at, sizeof word);
  return word;
}

/// visit(width, shift) for the parts of a code, lowest first.
template <class Visit>
void for_each_part(int bits, const Visit& visit) {
  int shift = 0;
  for (const int width : {8, 4, 2, 1})
    if ((bits & width) != 0) {
      visit(width, shift);
      shift += width;
    }
}

void pack_planar(std::span<const std::byte> codes, int bits, std::span<std::byte> words) {
  std::array<std::byte, kStretch> part = {};
  std::byte* out = words.data();
  for (size_t begin = 0; begin < codes.size(); begin += kStretch)
    for_each_part(bits, [&](int width, int shift) {
      for (size_t j = 0; j < kStretch; ++j)
        part.at(j) = static_cast<std::byte>(std::to_integer<unsigned>(codes[begin + j]) >> shift & ((1u << width) - 1));
      const auto bytes = static_cast<size_t>(width) * kWord;
      pack_bits(part, width, {out, bytes});
      out += bytes;
    });
}

void unpack_planar(std::span<const std::byte> words, int bits, std::span<std::byte> codes) {
  std::array<std::byte, kStretch> part = {};
  const std::byte* in = words.data();
  std::ranges::fill(codes, std::byte{0});
  for (size_t begin = 0; begin < codes.size(); begin += kStretch)
    for_each_part(bits, [&](int width, int shift) {
      const auto bytes = static_cast<size_t>(width) * kWord;
      unpack_bits({in, bytes}, width, part);
      for (size_t j = 0; j < kStretch; ++j) codes[begin + j] |= part.at(j) << shift;
      in += bytes;
    });
}

// ---- eight rows a word ----

constexpr size_t kPack = std::tuple_size_v<RowOrder>;
constexpr size_t kTileWords = 16, kTileColumns = 256;

using Bytes16 = uint8_t __attribute__((vector_size(16)));

Bytes16 load16(const std::byte* from) {
  Bytes16 bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return bytes;
}
void store16(Bytes16 bytes, std::byte* to) { std::memcpy(to, &bytes, sizeof bytes); }

/// Of two vectors: their first halves by turns, their last halves; every second byte, from the first and from the next.
Bytes16 zip_first(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Bytes16 zip_last(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
Bytes16 even(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
Bytes16 odd(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/// Eight rows of codes, `stride` apart, to one word a column.
void interleave(const RowOrder& order, const std::byte* codes, size_t stride, size_t columns, std::byte* words) {
  size_t k = 0;
  for (; k + sizeof(Bytes16) <= columns; k += sizeof(Bytes16)) {
    const auto pair = [&](size_t i) {
      return load16(codes + order[i] * stride + k) | load16(codes + order[i + 1] * stride + k) << 4;
    };
    const Bytes16 a = pair(0), b = pair(2), c = pair(4), d = pair(6);
    std::byte* const out = words + k * kWord;
    store16(zip_first(zip_first(a, c), zip_first(b, d)), out);
    store16(zip_last(zip_first(a, c), zip_first(b, d)), out + 16);
    store16(zip_first(zip_last(a, c), zip_last(b, d)), out + 32);
    store16(zip_last(zip_last(a, c), zip_last(b, d)), out + 48);
  }
  for (; k < columns; ++k) {
    uint32_t word = 0;
    for (size_t i = 0; i < kPack; ++i) word |= std::to_integer<uint32_t>(codes[order.at(i) * stride + k]) << (4 * i);
    std::memcpy(words + k * kWord, &word, sizeof word);
  }
}

void separate(const RowOrder& order, const std::byte* words, size_t columns, std::byte* codes, size_t stride) {
  size_t k = 0;
  for (; k + sizeof(Bytes16) <= columns; k += sizeof(Bytes16)) {
    const std::byte* const in = words + k * kWord;
    const Bytes16 w0 = load16(in), w1 = load16(in + 16), w2 = load16(in + 32), w3 = load16(in + 48);
    const auto pair = [&](size_t i, Bytes16 both) {
      store16(both & 15, codes + order[i] * stride + k);
      store16(both >> 4, codes + order[i + 1] * stride + k);
    };
    pair(0, even(even(w0, w1), even(w2, w3)));
    pair(2, even(odd(w0, w1), odd(w2, w3)));
    pair(4, odd(even(w0, w1), even(w2, w3)));
    pair(6, odd(odd(w0, w1), odd(w2, w3)));
  }
  for (; k < columns; ++k)
    for (size_t i = 0; i < kPack; ++i)
      codes[order.at(i) * stride + k] = static_cast<std::byte>(load_word(words + k * kWord) >> (4 * i) & 15);
}

}  // namespace

const WordPacking kDensePacking = {.pack = [](std::span<const std::byte> codes, int bits,
                                              std::span<std::byte> words) { pack_bits(codes, bits, words); },
                                   .unpack = [](std::span<const std::byte> words, int bits,
                                                std::span<std::byte> codes) { unpack_bits(words, bits, codes); }};
const WordPacking kPlanarPacking = {.pack = pack_planar, .unpack = unpack_planar};

namespace {

/// A row of a tile in which each code is `turned`, packed: what turns the packed rows.
std::array<std::byte, kTileCodes> turned_row(const WordPacking& packing, int bits, std::byte turned) {
  std::array<std::byte, kTileCodes> codes, row = {};
  codes.fill(turned);
  packing.pack(codes, bits, std::span(row).first(kTileCodes / 8 * static_cast<size_t>(bits)));
  return row;
}

void turn(const std::byte* by, size_t count, std::byte* bytes) {
  for (size_t i = 0; i < count; ++i) bytes[i] ^= by[i];
}

}  // namespace

std::vector<std::byte> pack_transposed(const WordPacking& packing, int bits, std::span<const std::byte> codes,
                                       size_t rows, size_t columns, std::byte turned) {
  BW_ASSERT(columns % kStretch == 0 && codes.size() == rows * columns);
  const auto width = static_cast<size_t>(bits);
  const auto by = turned_row(packing, bits, turned);
  const size_t line = std::max<size_t>(rows * kWord, 1), grain = kTileCodes / kStretch * width * line;
  return parallel_bytes(codes.size() / kStretch * width * kWord, grain, [&](size_t from, size_t to, std::byte* all) {
    std::array<std::byte, kTileRows*(kTileCodes + kBesides * kWord)> tile;
    const size_t in_row = (to - from) / line, stride = in_row + kBesides;
    const size_t k = from / line / width * kStretch, length = in_row / width * kStretch;
    for_each_tile(rows, kTileRows, [&](size_t row, size_t count) {
      for (size_t r = 0; r < count; ++r) {
        std::byte* const packed = &tile.at(r * stride * kWord);
        if (row + r + kTileRows < rows) prefetch(&codes[(row + r + kTileRows) * columns + k], length);
        packing.pack(codes.subspan((row + r) * columns + k, length), bits, {packed, in_row * kWord});
        if (turned != std::byte{0}) turn(by.data(), in_row * kWord, packed);
      }
      transpose_words(tile.data(), count, in_row, stride, all + from + row * kWord, rows);
    });
  });
}

std::vector<std::byte> unpack_transposed(const WordPacking& packing, int bits, std::span<const std::byte> words,
                                         size_t rows, size_t columns, std::byte turned) {
  const auto width = static_cast<size_t>(bits);
  BW_ASSERT(columns % kStretch == 0 && words.size() == rows * columns / kStretch * width * kWord);
  const auto by = turned_row(packing, bits, turned);
  const size_t all_in_row = columns / kStretch * width;
  const auto unpack_tile = [&](size_t row, size_t count, size_t k, size_t length, std::byte* to) {
    std::array<std::byte, kTileRows*(kTileCodes + kBesides * kWord)> tile;
    const size_t first = k / kStretch * width, in_row = length / kStretch * width, stride = in_row + kBesides;
    transpose_words(&words[(first * rows + row) * kWord], in_row, count, rows, tile.data(), stride);
    for (size_t i = first + in_row; i < std::min(first + 2 * in_row, all_in_row); ++i)
      prefetch(&words[(i * rows + row) * kWord], count * kWord);
    for (size_t r = 0; r < count; ++r) {
      std::byte* const packed = &tile.at(r * stride * kWord);
      if (turned != std::byte{0}) turn(by.data(), in_row * kWord, packed);
      packing.unpack({packed, in_row * kWord}, bits, {to + r * columns, length});
    }
  };
  return parallel_bytes(rows * columns, kTileRows * std::max<size_t>(columns, 1),
                        [&](size_t from, size_t to, std::byte* all) {
                          for_each_tile(columns, kTileCodes, [&](size_t k, size_t length) {
                            unpack_tile(from / columns, (to - from) / columns, k, length, all + from + k);
                          });
                        });
}

std::vector<std::byte> pack_interleaved(const RowOrder& order, std::span<const std::byte> codes, size_t matrices,
                                        size_t rows, size_t columns) {
  BW_ASSERT(rows % kPack == 0 && codes.size() == matrices * rows * columns);
  const size_t width = rows / kPack, line = std::max<size_t>(width * kWord, 1);
  return parallel_bytes(codes.size() / 2, kTileColumns * line, [&](size_t from, size_t to, std::byte* all) {
    std::array<std::byte, kTileWords*(kTileColumns + kBesides) * kWord> tile;
    for (size_t at = from / line, length = 0; at < to / line; at += length) {
      const size_t matrix = at / columns, k = at % columns;
      length = std::min(to / line - at, columns - k);
      const size_t stride = length + kBesides;
      for_each_tile(width, kTileWords, [&](size_t c, size_t count) {
        for (size_t i = 0; i < count; ++i)
          interleave(order, &codes[(matrix * rows + (c + i) * kPack) * columns + k], columns, length,
                     &tile.at(i * stride * kWord));
        transpose_words(tile.data(), count, length, stride, all + at * line + c * kWord, width);
      });
    }
  });
}

std::vector<std::byte> unpack_interleaved(const RowOrder& order, std::span<const std::byte> words, size_t matrices,
                                          size_t rows, size_t columns) {
  BW_ASSERT(rows % kPack == 0 && words.size() == matrices * rows / kPack * columns * kWord);
  const size_t width = rows / kPack, line = std::max<size_t>(kPack * columns, 1);
  return parallel_bytes(words.size() * 2, kTileWords * line, [&](size_t from, size_t to, std::byte* all) {
    std::array<std::byte, kTileWords*(kTileColumns + kBesides) * kWord> tile;
    for (size_t at = from / line, count = 0; at < to / line; at += count) {
      const size_t matrix = at / width, c = at % width;
      count = std::min(to / line - at, width - c);
      for_each_tile(columns, kTileColumns, [&](size_t k, size_t length) {
        const size_t stride = length + kBesides;
        transpose_words(&words[((matrix * columns + k) * width + c) * kWord], length, count, width, tile.data(),
                        stride);
        for (size_t i = 0; i < count; ++i)
          separate(order, &tile.at(i * stride * kWord), length, all + (at + i) * line + k, columns);
      });
    }
  });
}

std::vector<std::byte> transposed_bytes(std::span<const std::byte> from, size_t rows, size_t columns, size_t element) {
  BW_ASSERT(from.size() == rows * columns * element);
  constexpr size_t kTile = 64;  // of columns; what is read of them stays in the cache for the next rows
  std::vector<std::byte> to(from.size());
  const auto run = [&]<class T>(T /*type*/) {
    for (size_t c = 0; c < columns; c += kTile)
      for (size_t r = 0; r < rows; r += kTile)
        transpose_simply<T>(from.data() + (r * columns + c) * element, std::min(kTile, rows - r),
                            std::min(kTile, columns - c), columns, to.data() + (c * rows + r) * element, rows);
  };
  BW_ASSERT(element == 1 || element == 2 || element == 4);
  if (element == 1) run(uint8_t{});
  if (element == 2) run(uint16_t{});
  if (element == 4) run(uint32_t{});
  return to;
}

}  // namespace bitwright
