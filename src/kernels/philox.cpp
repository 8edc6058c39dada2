#include "kernels/philox.hpp"

#include <algorithm>
#include <array>
#include <cstddef>

#include "base/vectorized.hpp"

namespace bitwright {
namespace {

constexpr size_t kCounters = 64, kBlock = 4 * kCounters;
constexpr int kRounds = 10;
constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

/// words[w][c] = word w at counter c of this block.
using Block = uint32_t[4][kCounters];

BITWRIGHT_VECTORIZED
void make_block(const RandomStream& stream, uint64_t block, Block& words) {
  for (size_t c = 0; c < kCounters; ++c) {
    const uint64_t counter = block * kCounters + c;
    words[0][c] = static_cast<uint32_t>(counter);
    words[1][c] = static_cast<uint32_t>(counter >> 32);
    words[2][c] = static_cast<uint32_t>(stream.stream);
    words[3][c] = static_cast<uint32_t>(stream.stream >> 32);
  }
  auto key0 = static_cast<uint32_t>(stream.seed), key1 = static_cast<uint32_t>(stream.seed >> 32);
  for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1)
    for (size_t c = 0; c < kCounters; ++c) {
      const uint64_t a = uint64_t{kMultiply0} * words[0][c], b = uint64_t{kMultiply1} * words[2][c];
      words[0][c] = static_cast<uint32_t>(b >> 32) ^ words[1][c] ^ key0;
      words[2][c] = static_cast<uint32_t>(a >> 32) ^ words[3][c] ^ key1;
      words[1][c] = static_cast<uint32_t>(b);
      words[3][c] = static_cast<uint32_t>(a);
    }
}

}  // namespace

PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  auto& w = counter.words;
  auto key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1) {
    const uint64_t a = uint64_t{kMultiply0} * w[0], b = uint64_t{kMultiply1} * w[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ w[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ w[3] ^ key1, static_cast<uint32_t>(a)}};
  }
  return counter;
}

void random_numbers(const RandomStream& stream, uint64_t begin, std::span<uint32_t> out) {
  Block words;
  for (size_t done = 0; done < out.size();) {
    const uint64_t at = begin + done, block = at / kBlock;
    const auto skip = static_cast<size_t>(at % kBlock);
    const size_t count = std::min(out.size() - done, kBlock - skip);
    make_block(stream, block, words);
    std::copy_n(&words[0][0] + skip, count, &out[done]);
    done += count;
  }
}

}  // namespace bitwright
