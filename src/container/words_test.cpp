#include "container/words.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/bits.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

std::vector<std::byte> random_codes(size_t count, int bits) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::vector<std::byte> codes(count);
  for (std::byte& code : codes) code = static_cast<std::byte>(random() & ((1u << bits) - 1));
  return codes;
}

/// Each row packed by itself, its words to column `row` of what comes out.
std::vector<std::byte> transposed_plainly(const WordPacking& packing, int bits, std::vector<std::byte> codes,
                                          size_t rows, size_t columns, std::byte turned) {
  const size_t in_row = columns / 32 * static_cast<size_t>(bits);
  std::vector<std::byte> out(rows * in_row * 4), row(in_row * 4);
  for (std::byte& code : codes) code ^= turned;
  for (size_t r = 0; r < rows; ++r) {
    packing.pack(std::span(codes).subspan(r * columns, columns), bits, row);
    for (size_t w = 0; w < in_row; ++w) std::memcpy(&out[(w * rows + r) * 4], &row[w * 4], 4);
  }
  return out;
}

/// For one thread and for two: bytes are cleared in another way.
template <class Body>
void on_threads(const Body& body) {
  const size_t before = thread_count();
  for (const size_t threads : {1u, 2u}) {
    set_thread_count(threads);
    body();
  }
  set_thread_count(before);
}

TEST(WordsThreads, TransposedAsRowByRow) {
  on_threads([] {
    for (const WordPacking* packing : {&kDensePacking, &kPlanarPacking})
      for (const int bits : {2, 3, 4, 5, 6, 7, 8})
        for (const auto& [rows, columns] : std::vector<std::pair<size_t, size_t>>{
                 {0, 64}, {3, 0}, {1, 32}, {7, 96}, {64, 512}, {65, 544}, {131, 1056}, {200, 608}})
          for (const unsigned turned : {0u, 1u << (bits - 1)}) {
            SCOPED_TRACE(testing::Message() << bits << " bits, " << rows << " x " << columns << ", turned " << turned);
            const std::vector<std::byte> codes = random_codes(rows * columns, bits);
            const auto sign = static_cast<std::byte>(turned);
            const auto words = pack_transposed(*packing, bits, codes, rows, columns, sign);
            ASSERT_TRUE(words == transposed_plainly(*packing, bits, codes, rows, columns, sign));
            ASSERT_TRUE(unpack_transposed(*packing, bits, words, rows, columns, sign) == codes);
          }
  });
}

TEST(WordsThreads, InterleavedAsCodeByCode) {
  on_threads([] {
    for (const RowOrder* order : {&kAwqOrder, &kPlainOrder})
      for (const auto& [matrices, rows, columns] : std::vector<std::tuple<size_t, size_t, size_t>>{
               {1, 0, 5}, {2, 8, 0}, {1, 8, 1}, {1, 16, 7}, {3, 40, 33}, {1, 264, 257}, {2, 520, 300}, {5, 256, 70}}) {
        SCOPED_TRACE(testing::Message() << matrices << " x " << rows << " x " << columns);
        const std::vector<std::byte> codes = random_codes(matrices * rows * columns, 4);
        std::vector<std::byte> plain(codes.size() / 2);
        for (size_t m = 0; m < matrices; ++m)
          for (size_t k = 0; k < columns; ++k)
            for (size_t r = 0; r < rows; ++r) {
              const size_t at = ((m * columns + k) * rows + r) / 2;
              const std::byte code = codes[(m * rows + r / 8 * 8 + order->at(r % 8)) * columns + k];
              plain[at] |= r % 2 == 0 ? code : code << 4;
            }
        const auto words = pack_interleaved(*order, codes, matrices, rows, columns);
        ASSERT_TRUE(words == plain);
        ASSERT_TRUE(unpack_interleaved(*order, words, matrices, rows, columns) == codes);
      }
  });
}

TEST(BitsThreads, HighNibblesFirst) {
  on_threads([] {
    for (const size_t count : {0u, 1u, 2u, 31u, 32u, 33u, 32768u, 32769u, 100'001u}) {
      const std::vector<std::byte> codes = random_codes(count, 4);
      std::vector<std::byte> plain((count + 1) / 2);
      for (size_t i = 0; i < 2 * plain.size(); ++i) {
        const std::byte code = i < count ? codes[i] : std::byte{9};
        plain[i / 2] |= i % 2 == 0 ? code << 4 : code;
      }
      const auto packed = pack_high_first(codes, std::byte{9});
      ASSERT_TRUE(packed == plain) << count;
      ASSERT_TRUE(unpack_high_first(packed, count) == codes) << count;
    }
  });
}

}  // namespace
}  // namespace bitwright
