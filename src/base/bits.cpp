#include "base/bits.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kBlock = 8;                ///< codes that fill whole bytes, whatever their width
constexpr size_t kGrain = size_t{1} << 15;  ///< codes of one task, a multiple of kBlock

/// The low `bits` bits of each lane of a word.
template <int bits, int lane>
constexpr uint64_t low_bits() {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += lane) mask |= ((uint64_t{1} << bits) - 1) << at;
  return mask;
}

/// Neighbouring lanes with `bits` bits each: put together at the bottom of both, and taken apart again.
template <int bits, int lane>
uint64_t join(uint64_t word) {
  constexpr uint64_t kMask = low_bits<bits, 2 * lane>();
  return (word & kMask) | (word >> lane & kMask) << bits;
}
template <int bits, int lane>
uint64_t part(uint64_t word) {
  constexpr uint64_t kMask = low_bits<bits, 2 * lane>();
  return (word & kMask) | (word >> bits & kMask) << lane;
}

/// Eight codes to `bits` bytes, through one word.
template <int bits>
void pack_block(const std::byte* codes, std::byte* out) {
  uint64_t word = 0;
  std::memcpy(&word, codes, kBlock);
  word = join<4 * bits, 32>(join<2 * bits, 16>(join<bits, 8>(word)));
  std::memcpy(out, &word, bits);
}

/// size: bytes of `packed` that may be read: sizeof(uint64_t), and one load does, or `bits`.
template <int bits, size_t size>
void unpack_block(const std::byte* packed, std::byte* codes) {
  uint64_t word = 0;
  std::memcpy(&word, packed, size);
  word = part<bits, 8>(part<2 * bits, 16>(part<4 * bits, 32>(word)));
  std::memcpy(codes, &word, kBlock);
}

template <int bits>
void pack_blocks(const std::byte* codes, size_t blocks, std::byte* out) {
  if constexpr (bits == 8) {
    std::copy_n(codes, blocks * kBlock, out);
  } else if constexpr (bits == 4) {  // pairs, which the compiler turns into vectors
    for (size_t i = 0; i < blocks * 4; ++i) {
      uint16_t pair = 0;
      std::memcpy(&pair, codes + 2 * i, sizeof pair);
      out[i] = static_cast<std::byte>((pair | pair >> 4) & 0xff);
    }
  } else if constexpr (bits == 2) {
    for (size_t i = 0; i < blocks * 2; ++i) {
      uint32_t four = 0;
      std::memcpy(&four, codes + 4 * i, sizeof four);
      out[i] = static_cast<std::byte>((four | four >> 6 | four >> 12 | four >> 18) & 0xff);
    }
  } else {
    for (size_t i = 0; i < blocks; ++i) pack_block<bits>(codes + i * kBlock, out + i * bits);
  }
}

template <int bits>
void unpack_blocks(const std::byte* packed, size_t blocks, std::byte* codes) {
  if constexpr (bits == 8) {
    std::copy_n(packed, blocks * kBlock, codes);
  } else if constexpr (bits == 4) {
    for (size_t i = 0; i < blocks * 4; ++i) {
      const auto byte = std::to_integer<uint16_t>(packed[i]);
      const auto pair = static_cast<uint16_t>((byte | byte << 4) & 0x0f0f);
      std::memcpy(codes + 2 * i, &pair, sizeof pair);
    }
  } else if constexpr (bits == 2) {
    for (size_t i = 0; i < blocks * 2; ++i) {
      const auto byte = std::to_integer<uint32_t>(packed[i]);
      const uint32_t four = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303;
      std::memcpy(codes + 4 * i, &four, sizeof four);
    }
  } else {
    size_t i = 0;
    for (; (blocks - i) * bits >= sizeof(uint64_t); ++i)
      unpack_block<bits, sizeof(uint64_t)>(packed + i * bits, codes + i * kBlock);
    for (; i < blocks; ++i) unpack_block<bits, bits>(packed + i * bits, codes + i * kBlock);
  }
}

void pack_pairs(const std::byte* codes, size_t pairs, std::byte* out) {
  for (size_t i = 0; i < pairs; ++i) {
    uint16_t pair = 0;
    std::memcpy(&pair, codes + 2 * i, sizeof pair);
    out[i] = static_cast<std::byte>((pair << 4 | pair >> 8) & 0xff);
  }
}

void unpack_pairs(const std::byte* packed, size_t pairs, std::byte* codes) {
  for (size_t i = 0; i < pairs; ++i) {
    const auto byte = std::to_integer<uint16_t>(packed[i]);
    const auto pair = static_cast<uint16_t>((byte >> 4 | byte << 8) & 0x0f0f);
    std::memcpy(codes + 2 * i, &pair, sizeof pair);
  }
}

using Blocks = void (*)(const std::byte* from, size_t blocks, std::byte* to);
constexpr std::array<Blocks, 8> kPack = {pack_blocks<1>, pack_blocks<2>, pack_blocks<3>, pack_blocks<4>,
                                         pack_blocks<5>, pack_blocks<6>, pack_blocks<7>, pack_blocks<8>};
constexpr std::array<Blocks, 8> kUnpack = {unpack_blocks<1>, unpack_blocks<2>, unpack_blocks<3>, unpack_blocks<4>,
                                           unpack_blocks<5>, unpack_blocks<6>, unpack_blocks<7>, unpack_blocks<8>};

}  // namespace

void pack_bits(std::span<const std::byte> codes, int bits, std::span<std::byte> out) {
  BW_ASSERT(bits >= 1 && bits <= 8 && out.size() == packed_bytes(codes.size(), bits));
  const Blocks pack = kPack.at(static_cast<size_t>(bits - 1));
  const size_t whole = codes.size() / kBlock, rest = codes.size() % kBlock;
  pack(codes.data(), whole, out.data());
  if (rest == 0) return;
  std::array<std::byte, kBlock> last = {}, packed = {};
  std::ranges::copy(codes.last(rest), last.begin());
  pack(last.data(), 1, packed.data());
  std::copy_n(packed.begin(), packed_bytes(rest, bits), out.begin() + static_cast<std::ptrdiff_t>(whole) * bits);
}

std::vector<std::byte> pack_bits(std::span<const std::byte> codes, int bits) {
  const auto width = static_cast<size_t>(bits);
  return parallel_bytes(
      packed_bytes(codes.size(), bits), kGrain / kBlock * width, [&](size_t begin, size_t end, std::byte* all) {
        const size_t first = begin / width * kBlock;
        pack_bits(codes.subspan(first, std::min(kGrain, codes.size() - first)), bits, {all + begin, end - begin});
      });
}

void unpack_bits(std::span<const std::byte> packed, int bits, std::span<std::byte> codes) {
  BW_ASSERT(bits >= 1 && bits <= 8 && packed.size() >= packed_bytes(codes.size(), bits));
  const Blocks unpack = kUnpack.at(static_cast<size_t>(bits - 1));
  const size_t whole = codes.size() / kBlock, rest = codes.size() % kBlock;
  unpack(packed.data(), whole, codes.data());
  if (rest == 0) return;
  std::array<std::byte, kBlock> last = {}, bytes = {};
  std::copy_n(packed.data() + whole * static_cast<size_t>(bits), packed_bytes(rest, bits), bytes.begin());
  unpack(bytes.data(), 1, last.data());
  std::copy_n(last.begin(), rest, codes.begin() + static_cast<std::ptrdiff_t>(codes.size() - rest));
}

std::vector<std::byte> unpack_bits(std::span<const std::byte> packed, int bits, uint64_t count) {
  BW_ASSERT(bits >= 1 && bits <= 8 && packed.size() >= packed_bytes(count, bits));
  return parallel_bytes(count, kGrain, [&](size_t begin, size_t end, std::byte* all) {
    unpack_bits(packed.subspan(packed_bytes(begin, bits)), bits, {all + begin, end - begin});
  });
}

std::vector<std::byte> pack_high_first(std::span<const std::byte> codes, std::byte filler) {
  return parallel_bytes((codes.size() + 1) / 2, kGrain / 2, [&](size_t begin, size_t end, std::byte* all) {
    const size_t pairs = std::min(end, codes.size() / 2);
    pack_pairs(codes.data() + 2 * begin, pairs - begin, all + begin);
    if (pairs < end) all[pairs] = codes.back() << 4 | filler;
  });
}

std::vector<std::byte> unpack_high_first(std::span<const std::byte> packed, uint64_t count) {
  BW_ASSERT(packed.size() >= (count + 1) / 2);
  return parallel_bytes(count, kGrain, [&](size_t begin, size_t end, std::byte* all) {
    unpack_pairs(packed.data() + begin / 2, (end - begin) / 2, all + begin);
    if (end % 2 != 0) all[end - 1] = packed[end / 2] >> 4;
  });
}

}  // namespace bitwright
