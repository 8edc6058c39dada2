#pragma once

#include <cstdint>
#include <span>

namespace bitwright {

/// Random numbers that are counted, not drawn: number i of a stream is the same whoever asks for it, in any order.
/// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).
struct RandomStream {
  uint64_t seed = 0;    ///< the key
  uint64_t stream = 0;  ///< the upper half of the counter
};

/// Four words, as the paper defines them.
struct PhiloxWords {
  uint32_t words[4];
};
PhiloxWords philox(PhiloxWords counter, uint64_t key);

/// out[j] = number begin + j: word i % 256 / 64 at the counter i / 256 * 64 + i % 64, so that neighbours differ in the
/// counter alone and are made side by side.
void random_numbers(const RandomStream& stream, uint64_t begin, std::span<uint32_t> out);

/// In [0, 1), in steps of 2^-24.
inline float unit_interval(uint32_t random) { return static_cast<float>(random >> 8) * 0x1p-24f; }

}  // namespace bitwright
