#include "container/row_parts.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kGrain = size_t{1} << 16;  ///< words a task works on
constexpr size_t kTile = size_t{1} << 12;   ///< words that stay in the first cache while all parts pass over them

/// Eight bytes at once: codes leave room for the shift, and what crosses into a neighbour is masked away.
constexpr uint64_t every_byte(unsigned value) { return uint64_t{value} * 0x0101010101010101u; }

void add_part8(const std::byte* codes, size_t count, int shift, std::byte* words) {
  size_t i = 0;
  for (; i + sizeof(uint64_t) <= count; i += sizeof(uint64_t)) {
    uint64_t in = 0, out = 0;
    std::memcpy(&in, codes + i, sizeof in);
    std::memcpy(&out, words + i, sizeof out);
    out |= in << shift;
    std::memcpy(words + i, &out, sizeof out);
  }
  for (; i < count; ++i) words[i] |= codes[i] << shift;
}

void take_part8(const std::byte* words, size_t count, int shift, unsigned mask, std::byte* codes) {
  const uint64_t all = every_byte(mask);
  size_t i = 0;
  for (; i + sizeof(uint64_t) <= count; i += sizeof(uint64_t)) {
    uint64_t in = 0;
    std::memcpy(&in, words + i, sizeof in);
    in = (in >> shift) & all;
    std::memcpy(codes + i, &in, sizeof in);
  }
  for (; i < count; ++i) codes[i] = (words[i] >> shift) & static_cast<std::byte>(mask);
}

void add_part32(const std::byte* codes, size_t count, int shift, std::byte* words) {
  for (size_t i = 0; i < count; ++i) {
    uint32_t word = 0;
    std::memcpy(&word, words + i * sizeof word, sizeof word);
    word |= std::to_integer<uint32_t>(codes[i]) << shift;
    std::memcpy(words + i * sizeof word, &word, sizeof word);
  }
}

void take_part32(const std::byte* words, size_t count, int shift, unsigned mask, std::byte* codes) {
  for (size_t i = 0; i < count; ++i) {
    uint32_t word = 0;
    std::memcpy(&word, words + i * sizeof word, sizeof word);
    codes[i] = static_cast<std::byte>(word >> shift & mask);
  }
}

/// Calls visit(part, first word, first code, count) for what of each part lies in tiles of words; all parts of a tile
/// before the next one.
template <class Visit>
void for_each_tile(const RowParts& parts, int64_t rows, int64_t columns, const Visit& visit) {
  const auto words = static_cast<size_t>(parts.packed_rows(rows) * columns);
  const auto codes = static_cast<size_t>(rows * columns);
  parallel_ranges(words, kGrain, [&](size_t begin, size_t end) {
    for (size_t tile = begin; tile < end; tile += kTile)
      for (int part = 0; part < parts.parts; ++part) {
        const size_t first = static_cast<size_t>(part) * words + tile;
        if (first >= codes) break;
        visit(part, tile, first, std::min({kTile, end - tile, codes - first}));
      }
  });
}

}  // namespace

std::vector<std::byte> pack_row_parts(const RowParts& parts, std::span<const std::byte> codes, int64_t rows,
                                      int64_t columns) {
  BW_ASSERT(codes.size() == static_cast<size_t>(rows * columns));
  if (parts.parts == 1) return {codes.begin(), codes.end()};
  const size_t size = parts.word_bytes;
  std::vector<std::byte> packed(static_cast<size_t>(parts.packed_rows(rows) * columns) * size);
  const auto add = size == 1 ? add_part8 : add_part32;
  for_each_tile(parts, rows, columns, [&](int part, size_t word, size_t code, size_t count) {
    add(codes.data() + code, count, parts.shift(part), packed.data() + word * size);
  });
  return packed;
}

std::vector<std::byte> unpack_row_parts(const RowParts& parts, std::span<const std::byte> packed, int64_t rows,
                                        int64_t columns) {
  const size_t size = parts.word_bytes;
  BW_ASSERT(packed.size() == static_cast<size_t>(parts.packed_rows(rows) * columns) * size);
  if (parts.parts == 1) return {packed.begin(), packed.end()};
  std::vector<std::byte> codes(static_cast<size_t>(rows * columns));
  const auto take = size == 1 ? take_part8 : take_part32;
  const unsigned mask = (1u << parts.bits) - 1;
  for_each_tile(parts, rows, columns, [&](int part, size_t word, size_t code, size_t count) {
    take(packed.data() + word * size, count, parts.shift(part), mask, codes.data() + code);
  });
  return codes;
}

}  // namespace bitwright
