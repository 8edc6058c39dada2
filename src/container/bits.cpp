#include "container/bits.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kBlock = 8;                ///< codes that fill whole bytes, whatever their width
constexpr size_t kGrain = size_t{1} << 18;  ///< codes of one task, a multiple of kBlock

/// Eight codes to `bits` bytes, through one word.
template <int bits>
void pack_block(const std::byte* codes, std::byte* out) {
  uint64_t word = 0;
  for (size_t i = 0; i < kBlock; ++i) word |= std::to_integer<uint64_t>(codes[i]) << (i * bits);
  std::memcpy(out, &word, bits);
}

template <int bits>
void unpack_block(const std::byte* packed, std::byte* codes) {
  uint64_t word = 0;
  std::memcpy(&word, packed, bits);
  for (size_t i = 0; i < kBlock; ++i) codes[i] = static_cast<std::byte>(word >> (i * bits) & ((1u << bits) - 1));
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
    for (size_t i = 0; i < blocks; ++i) unpack_block<bits>(packed + i * bits, codes + i * kBlock);
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
  std::vector<std::byte> out(packed_bytes(codes.size(), bits));
  parallel_ranges(codes.size(), kGrain, [&](size_t begin, size_t end) {
    pack_bits(codes.subspan(begin, end - begin), bits,
              std::span(out).subspan(packed_bytes(begin, bits), packed_bytes(end - begin, bits)));
  });
  return out;
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
  std::vector<std::byte> codes(count);
  parallel_ranges(count, kGrain, [&](size_t begin, size_t end) {
    unpack_bits(packed.subspan(packed_bytes(begin, bits)), bits, std::span(codes).subspan(begin, end - begin));
  });
  return codes;
}

}  // namespace bitwright
