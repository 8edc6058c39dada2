#include "container/gguf_blocks.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "base/error.hpp"
#include "container/gguf_grids.hpp"

namespace bitwright {
namespace {

// Blocks as ggml (d99724f), src/ggml-common.h, lays them out; all numbers are little-endian. An f16 is two bytes.
constexpr size_t kHalf = 2, kSmall = 32, kSuper = 256;

uint16_t u16_at(const uint8_t* from) {
  uint16_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return value;
}
uint32_t u32_at(const uint8_t* from) {
  uint32_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return value;
}
void put(uint8_t* to, auto value) { std::memcpy(to, &value, sizeof value); }
uint8_t byte(unsigned value) { return static_cast<uint8_t>(value); }

// ---- schemes

Scheme flat(const ElementType& element, int64_t group, Scheme scale = plain(DType::f16)) {
  return {.element = &element, .scale = parameter(Grouping::along(group), std::move(scale))};
}
Scheme shifted(Scheme scheme, float by) {
  scheme.offset_kind = OffsetKind::shift;
  scheme.shift = by;
  return scheme;
}
Scheme with_offset(Scheme scheme, OffsetKind kind) {
  scheme.offset_kind = kind;
  scheme.offset = scheme.scale;
  return scheme;
}
const ElementType& unsigned_element(int bits) { return integer_element(bits, false); }

// ---- blocks of 32: nibbles j | j + 16 << 4

void unpack_nibbles(const uint8_t* from, size_t half, uint8_t* codes) {
  for (size_t j = 0; j < half; ++j) {
    codes[j] = from[j] & 15;
    codes[j + half] = from[j] >> 4;
  }
}
void pack_nibbles(const uint8_t* codes, size_t half, uint8_t* to) {
  for (size_t j = 0; j < half; ++j) to[j] = byte(codes[j] | codes[j + half] << 4);
}

/// The fifth bit of code j is bit j.
void unpack_fives(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
  unpack_nibbles(low, kSmall / 2, codes);
  const uint32_t bits = u32_at(high);
  for (size_t j = 0; j < kSmall; ++j) codes[j] = byte(codes[j] | (bits >> j & 1) << 4);
}
void pack_fives(const uint8_t* codes, uint8_t* high, uint8_t* low) {
  uint32_t bits = 0;
  std::array<uint8_t, kSmall> nibbles;
  for (size_t j = 0; j < kSmall; ++j) nibbles[j] = codes[j] & 15;
  for (size_t j = 0; j < kSmall; j += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, codes + j, sizeof eight);
    // The fifth bit of byte k moves to bit 56 + k.
    bits |= static_cast<uint32_t>((eight >> 4 & 0x0101010101010101) * 0x0102040810204080 >> 56) << j;
  }
  pack_nibbles(nibbles.data(), kSmall / 2, low);
  put(high, bits);
}

// Q4_0: d | 16 bytes. Q4_1: d, m | 16 bytes. Q5_0: d | fifth bits | 16 bytes. Q5_1 likewise. Q8_0: d | 32 codes.
Scheme q4_0() { return shifted(flat(unsigned_element(4), kSmall), 8); }
Scheme q4_1() { return with_offset(flat(unsigned_element(4), kSmall), OffsetKind::bias); }
Scheme q5_0() { return shifted(flat(unsigned_element(5), kSmall), 16); }
Scheme q5_1() { return with_offset(flat(unsigned_element(5), kSmall), OffsetKind::bias); }
Scheme q8_0() { return flat(integer_element(8, true), kSmall); }
Scheme iq4_nl() { return flat(*find_element("iq4"), kSmall); }
Scheme mxfp4() { return flat(*find_element("float4_e2m1"), kSmall, plain(DType::f8_e8m0)); }

/// A scale of `kScale` bytes, then nibbles.
template <size_t kScale>
void unpack_scaled_nibbles(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kScale, to.scale);
  unpack_nibbles(block + kScale, kSmall / 2, to.codes);
}
template <size_t kScale>
void pack_scaled_nibbles(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale, kScale, block);
  pack_nibbles(from.codes, kSmall / 2, block + kScale);
}

void unpack_q4_1(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kHalf, to.scale);
  std::copy_n(block + kHalf, kHalf, to.offset);
  unpack_nibbles(block + 2 * kHalf, kSmall / 2, to.codes);
}
void pack_q4_1(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale, kHalf, block);
  std::copy_n(from.offset, kHalf, block + kHalf);
  pack_nibbles(from.codes, kSmall / 2, block + 2 * kHalf);
}

void unpack_q5_0(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kHalf, to.scale);
  unpack_fives(block + kHalf, block + kHalf + 4, to.codes);
}
void pack_q5_0(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale, kHalf, block);
  pack_fives(from.codes, block + kHalf, block + kHalf + 4);
}

void unpack_q5_1(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kHalf, to.scale);
  std::copy_n(block + kHalf, kHalf, to.offset);
  unpack_fives(block + 2 * kHalf, block + 2 * kHalf + 4, to.codes);
}
void pack_q5_1(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale, kHalf, block);
  std::copy_n(from.offset, kHalf, block + kHalf);
  pack_fives(from.codes, block + 2 * kHalf, block + 2 * kHalf + 4);
}

void unpack_q8_0(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kHalf, to.scale);
  std::copy_n(block + kHalf, kSmall, to.codes);
}
void pack_q8_0(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale, kHalf, block);
  std::copy_n(from.codes, kSmall, block + kHalf);
}

// NVFP4: 4 scales | for each 16 codes 8 bytes of nibbles j | j + 8 << 4
constexpr size_t kNvGroups = 4, kNvGroup = 16;
Scheme nvfp4() {
  return flat(*find_element("float4_e2m1"), static_cast<int64_t>(kNvGroup), {.element = find_element("ue4m3")});
}
void unpack_nvfp4(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kNvGroups, to.scale);
  for (size_t g = 0; g < kNvGroups; ++g)
    unpack_nibbles(block + kNvGroups + g * kNvGroup / 2, kNvGroup / 2, to.codes + g * kNvGroup);
}
void pack_nvfp4(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale, kNvGroups, block);
  for (size_t g = 0; g < kNvGroups; ++g)
    pack_nibbles(from.codes + g * kNvGroup, kNvGroup / 2, block + kNvGroups + g * kNvGroup / 2);
}

// Q1_0: d | 128 bits. Q2_0: d | 64 codes of 2 bits, in order.
constexpr size_t kOnes = 128, kTwos = 64;
Scheme q1_0() { return flat(*find_element("sign"), kOnes); }
Scheme q2_0() { return shifted(flat(unsigned_element(2), kTwos), 1); }

template <size_t kCount, unsigned kBits>
void unpack_dense(const uint8_t* block, const BlockParts& to) {
  constexpr size_t kEach = 8 / kBits;
  std::copy_n(block, kHalf, to.scale);
  for (size_t j = 0; j < kCount; ++j)
    to.codes[j] = byte(block[kHalf + j / kEach] >> kBits * (j % kEach) & ((1u << kBits) - 1));
}
template <size_t kCount, unsigned kBits>
void pack_dense(const BlockParts& from, uint8_t* block) {
  constexpr size_t kEach = 8 / kBits;
  std::copy_n(from.scale, kHalf, block);
  std::fill_n(block + kHalf, kCount / kEach, uint8_t{0});
  for (size_t j = 0; j < kCount; ++j)
    block[kHalf + j / kEach] = byte(block[kHalf + j / kEach] | from.codes[j] << kBits * (j % kEach));
}

// ---- super-blocks of 256, whose scales are codes themselves

Scheme scale_codes(const ElementType& element, int64_t groups) { return flat(element, groups); }
Scheme super(int bits, int64_t group, Scheme scale) { return flat(unsigned_element(bits), group, std::move(scale)); }

/// Code 128 h + 32 s + l is bits 2 s, 2 s + 1 of byte 32 h + l.
void unpack_twos(const uint8_t* from, uint8_t* codes) {
  for (size_t h = 0; h < 2; ++h)
    for (size_t s = 0; s < 4; ++s)
      for (size_t l = 0; l < 32; ++l) codes[128 * h + 32 * s + l] = from[32 * h + l] >> 2 * s & 3;
}
void pack_twos(const uint8_t* codes, uint8_t* to) {
  for (size_t h = 0; h < 2; ++h)
    for (size_t l = 0; l < 32; ++l) {
      const uint8_t* const c = codes + 128 * h + l;
      to[32 * h + l] = byte((c[0] & 3) | (c[32] & 3) << 2 | (c[64] & 3) << 4 | (c[96] & 3) << 6);
    }
}

/// Bit kBit of code 32 k + l, the highest there is, becomes bit k of byte l.
template <unsigned kBit>
void pack_highest(const uint8_t* codes, uint8_t* to) {
  std::array<uint8_t, 32> bytes{};
  for (size_t k = 8; k-- > 0;)
    for (size_t l = 0; l < 32; ++l) bytes[l] = byte(bytes[l] << 1 | codes[32 * k + l] >> kBit);
  std::ranges::copy(bytes, to);
}

// Q2_K: 16 bytes, scale | minimum << 4 | 64 bytes of codes | d, dmin
Scheme q2_k() { return with_offset(super(2, 16, scale_codes(unsigned_element(4), 16)), OffsetKind::minimum); }
void unpack_q2_k(const uint8_t* block, const BlockParts& to) {
  for (size_t g = 0; g < 16; ++g) {
    to.scale[g] = block[g] & 15;
    to.offset[g] = block[g] >> 4;
  }
  unpack_twos(block + 16, to.codes);
  std::copy_n(block + 80, kHalf, to.scale_scale);
  std::copy_n(block + 82, kHalf, to.offset_scale);
}
void pack_q2_k(const BlockParts& from, uint8_t* block) {
  for (size_t g = 0; g < 16; ++g) block[g] = byte(from.scale[g] | from.offset[g] << 4);
  pack_twos(from.codes, block + 16);
  std::copy_n(from.scale_scale, kHalf, block + 80);
  std::copy_n(from.offset_scale, kHalf, block + 82);
}

// Q3_K: 32 bytes of third bits, code 32 k + l at bit k of byte l | 64 bytes of lower bits | 12 bytes of scales | d.
// Scale j: its lower 4 bits are nibble j / 8 of byte j % 8, the upper 2 bits 2 (j / 4) of byte 8 + j % 4.
Scheme q3_k() { return shifted(super(3, 16, shifted(scale_codes(unsigned_element(6), 16), 32)), 4); }
void unpack_q3_k(const uint8_t* block, const BlockParts& to) {
  unpack_twos(block + 32, to.codes);
  for (size_t i = 0; i < kSuper; ++i) to.codes[i] = byte(to.codes[i] | (block[i % 32] >> i / 32 & 1) << 2);
  const uint8_t* const scales = block + 96;
  for (size_t j = 0; j < 16; ++j)
    to.scale[j] = byte((scales[j % 8] >> 4 * (j / 8) & 15) | (scales[8 + j % 4] >> 2 * (j / 4) & 3) << 4);
  std::copy_n(block + 108, kHalf, to.scale_scale);
}
void pack_q3_k(const BlockParts& from, uint8_t* block) {
  std::fill_n(block, 110, uint8_t{0});
  pack_twos(from.codes, block + 32);
  pack_highest<2>(from.codes, block);
  uint8_t* const scales = block + 96;
  for (size_t j = 0; j < 16; ++j) {
    scales[j % 8] = byte(scales[j % 8] | (from.scale[j] & 15) << 4 * (j / 8));
    scales[8 + j % 4] = byte(scales[8 + j % 4] | from.scale[j] >> 4 << 2 * (j / 4));
  }
  std::copy_n(from.scale_scale, kHalf, block + 108);
}

/// Eight scales and minimums of 6 bits in 12 bytes: the first four of each in bytes of their own, whose upper 2 bits
/// are those of the last four, whose nibbles share the last four bytes.
void unpack_sixes(const uint8_t* from, uint8_t* scale, uint8_t* offset) {
  for (size_t j = 0; j < 4; ++j) {
    scale[j] = from[j] & 63;
    offset[j] = from[j + 4] & 63;
    scale[j + 4] = byte((from[j + 8] & 15) | from[j] >> 6 << 4);
    offset[j + 4] = byte(from[j + 8] >> 4 | from[j + 4] >> 6 << 4);
  }
}
void pack_sixes(const uint8_t* scale, const uint8_t* offset, uint8_t* to) {
  for (size_t j = 0; j < 4; ++j) {
    to[j] = byte(scale[j] | scale[j + 4] >> 4 << 6);
    to[j + 4] = byte(offset[j] | offset[j + 4] >> 4 << 6);
    to[j + 8] = byte((scale[j + 4] & 15) | (offset[j + 4] & 15) << 4);
  }
}

// Q4_K: d, dmin | 12 bytes of scales | for each 64 codes 32 bytes of nibbles l | l + 32 << 4
// Q5_K: d, dmin | 12 bytes | 32 bytes of fifth bits, code 32 k + l at bit k of byte l | as Q4_K
Scheme q4_k() { return with_offset(super(4, 32, scale_codes(unsigned_element(6), 8)), OffsetKind::minimum); }
Scheme q5_k() { return with_offset(super(5, 32, scale_codes(unsigned_element(6), 8)), OffsetKind::minimum); }
constexpr size_t kSixes = 2 * kHalf, kCodes4 = 16, kCodes5 = 48;

void unpack_head(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kHalf, to.scale_scale);
  std::copy_n(block + kHalf, kHalf, to.offset_scale);
  unpack_sixes(block + kSixes, to.scale, to.offset);
}
void pack_head(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale_scale, kHalf, block);
  std::copy_n(from.offset_scale, kHalf, block + kHalf);
  pack_sixes(from.scale, from.offset, block + kSixes);
}

void unpack_q4_k(const uint8_t* block, const BlockParts& to) {
  unpack_head(block, to);
  for (size_t c = 0; c < 4; ++c) unpack_nibbles(block + kCodes4 + 32 * c, 32, to.codes + 64 * c);
}
void pack_q4_k(const BlockParts& from, uint8_t* block) {
  pack_head(from, block);
  for (size_t c = 0; c < 4; ++c) pack_nibbles(from.codes + 64 * c, 32, block + kCodes4 + 32 * c);
}

void unpack_q5_k(const uint8_t* block, const BlockParts& to) {
  unpack_head(block, to);
  for (size_t c = 0; c < 4; ++c) unpack_nibbles(block + kCodes5 + 32 * c, 32, to.codes + 64 * c);
  for (size_t i = 0; i < kSuper; ++i) to.codes[i] = byte(to.codes[i] | (block[kCodes4 + i % 32] >> i / 32 & 1) << 4);
}
void pack_q5_k(const BlockParts& from, uint8_t* block) {
  pack_head(from, block);
  std::array<uint8_t, kSuper> low{};
  for (size_t i = 0; i < kSuper; ++i) low[i] = from.codes[i] & 15;
  pack_highest<4>(from.codes, block + kCodes4);
  for (size_t c = 0; c < 4; ++c) pack_nibbles(low.data() + 64 * c, 32, block + kCodes5 + 32 * c);
}

// Q6_K: 128 bytes of lower bits | 64 of upper 2 bits | 16 scales | d. Of half h, codes 32 s + l: nibble s / 2 of byte
// 64 h + 32 (s % 2) + l, and bits 2 s of byte 32 h + l.
Scheme q6_k() { return shifted(super(6, 16, scale_codes(integer_element(8, true), 16)), 32); }
void unpack_q6_k(const uint8_t* block, const BlockParts& to) {
  for (size_t h = 0; h < 2; ++h)
    for (size_t s = 0; s < 4; ++s)
      for (size_t l = 0; l < 32; ++l)
        to.codes[128 * h + 32 * s + l] =
            byte((block[64 * h + 32 * (s % 2) + l] >> 4 * (s / 2) & 15) | (block[128 + 32 * h + l] >> 2 * s & 3) << 4);
  std::copy_n(block + 192, 16, to.scale);
  std::copy_n(block + 208, kHalf, to.scale_scale);
}
void pack_q6_k(const BlockParts& from, uint8_t* block) {
  for (size_t h = 0; h < 2; ++h)
    for (size_t l = 0; l < 32; ++l) {
      const uint8_t* const c = from.codes + 128 * h + l;
      block[64 * h + l] = byte((c[0] & 15) | (c[64] & 15) << 4);
      block[64 * h + 32 + l] = byte((c[32] & 15) | (c[96] & 15) << 4);
      block[128 + 32 * h + l] = byte(c[0] >> 4 | c[32] >> 4 << 2 | c[64] >> 4 << 4 | c[96] >> 4 << 6);
    }
  std::copy_n(from.scale, 16, block + 192);
  std::copy_n(from.scale_scale, kHalf, block + 208);
}

// IQ4_XS: d | upper 2 bits of the scales | 4 bytes of their nibbles | for each 32 codes 16 bytes of nibbles
Scheme iq4_xs() { return flat(*find_element("iq4"), 32, shifted(scale_codes(unsigned_element(6), 8), 32)); }
void unpack_iq4_xs(const uint8_t* block, const BlockParts& to) {
  std::copy_n(block, kHalf, to.scale_scale);
  const uint16_t high = u16_at(block + 2);
  for (size_t g = 0; g < 8; ++g) {
    to.scale[g] = byte((block[4 + g / 2] >> 4 * (g % 2) & 15) | (high >> 2 * g & 3) << 4);
    unpack_nibbles(block + 8 + 16 * g, 16, to.codes + 32 * g);
  }
}
void pack_iq4_xs(const BlockParts& from, uint8_t* block) {
  std::copy_n(from.scale_scale, kHalf, block);
  unsigned high = 0;
  std::fill_n(block + 4, 4, uint8_t{0});
  for (size_t g = 0; g < 8; ++g) {
    high |= static_cast<unsigned>(from.scale[g] >> 4) << 2 * g;
    block[4 + g / 2] = byte(block[4 + g / 2] | (from.scale[g] & 15) << 4 * (g % 2));
    pack_nibbles(from.codes + 32 * g, 16, block + 8 + 16 * g);
  }
  put(block + 2, static_cast<uint16_t>(high));
}

// TQ2_0: 64 bytes of codes, as those of Q2_K | d
Scheme tq2_0() { return shifted(flat(unsigned_element(2), kSuper), 1); }
void unpack_tq2_0(const uint8_t* block, const BlockParts& to) {
  unpack_twos(block, to.codes);
  std::copy_n(block + 64, kHalf, to.scale);
}
void pack_tq2_0(const BlockParts& from, uint8_t* block) {
  pack_twos(from.codes, block);
  std::copy_n(from.scale, kHalf, block + 64);
}

// TQ1_0: 32 bytes of 5 codes, 16 of 5, 4 of 4 | d. A byte is the fraction 0.c0 c1 c2 c3 c4 in base 3, of 256, rounded
// up; its codes are apart by the number of bytes.
Scheme tq1_0() { return flat(*find_element("ternary"), kSuper); }
struct Trits {
  size_t first_byte, bytes, first_code, digits;
};
constexpr std::array<Trits, 3> kTrits = {{{0, 32, 0, 5}, {32, 16, 160, 5}, {48, 4, 240, 4}}};

void unpack_tq1_0(const uint8_t* block, const BlockParts& to) {
  for (const Trits& part : kTrits)
    for (size_t m = 0; m < part.bytes; ++m) {
      unsigned rest = block[part.first_byte + m];
      for (size_t n = 0; n < part.digits; ++n) {
        to.codes[part.first_code + n * part.bytes + m] = byte(rest * 3 >> 8);
        rest = rest * 3 & 255;
      }
    }
  std::copy_n(block + 52, kHalf, to.scale);
}
void pack_tq1_0(const BlockParts& from, uint8_t* block) {
  for (const Trits& part : kTrits)
    for (size_t m = 0; m < part.bytes; ++m) {
      unsigned value = 0;
      for (size_t n = 0; n < 5; ++n)
        value = 3 * value + (n < part.digits ? from.codes[part.first_code + n * part.bytes + m] : 0u);
      block[part.first_byte + m] = byte((value * 256 + 242) / 243);
    }
  std::copy_n(from.scale, kHalf, block + 52);
}

// ---- codebooks. A code is a level, its highest bit the sign, or of IQ1 that of the eighth.

constexpr uint8_t kSign = 8;

/// Codes are multiplied by (code of the scale + 1/2) * factor * d.
Scheme codebook(const char* name, int64_t group, int scale_bits, float factor) {
  Scheme scale = shifted(scale_codes(unsigned_element(scale_bits), static_cast<int64_t>(kSuper) / group), -0.5f);
  scale.factor = factor;
  return flat(*find_element(name), group, std::move(scale));
}
Scheme iq2_xxs() { return codebook("iq2_xxs", 32, 4, 0.25f); }
Scheme iq2_xs() { return codebook("iq2_xs", 16, 4, 0.25f); }
Scheme iq2_s() { return codebook("iq2_s", 16, 4, 0.25f); }
Scheme iq3_xxs() { return codebook("iq3_xxs", 32, 4, 0.5f); }
Scheme iq3_s() { return codebook("iq3_s", 32, 4, 2); }
Scheme iq1_s() { return codebook("iq1_s", 32, 3, 2); }
Scheme iq1_m() { return codebook("iq1_m", 16, 3, 2); }

/// signs: bit j that of neighbour j.
void unpack_entry(const GgufGrid& grid, unsigned index, unsigned signs, uint8_t* codes) {
  for (int j = 0; j < grid.neighbours; ++j)
    codes[j] = byte(grid.level(grid.entries[index], j) | (signs >> j & 1) * kSign);
}
unsigned index_of(const GgufGrid& grid, const uint8_t* codes) {
  unsigned entry = 0;
  for (int j = 0; j < grid.neighbours; ++j) entry |= static_cast<unsigned>(codes[j] % kSign) << j * grid.level_bits;
  const int16_t index = entry < grid.index_of.size() ? grid.index_of[entry] : int16_t{-1};
  BW_ASSERT(index >= 0);  // what an encoder made is in the codebook
  return static_cast<unsigned>(index);
}
unsigned signs_of(const uint8_t* codes) {
  unsigned signs = 0;
  for (unsigned j = 0; j < 8; ++j) signs |= static_cast<unsigned>(codes[j] / kSign) << j;
  return signs;
}
/// Seven signs; the eighth makes their number even.
unsigned all_signs(unsigned seven) { return seven | (static_cast<unsigned>(std::popcount(seven)) & 1) << 7; }

// IQ2_XXS: d | for each 32 codes: 4 indices of a byte | 4 times 7 signs, scale << 28
void unpack_iq2_xxs(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq2_xxs");
  std::copy_n(block, kHalf, to.scale_scale);
  for (size_t g = 0; g < 8; ++g) {
    const uint8_t* const from = block + kHalf + 8 * g;
    const uint32_t rest = u32_at(from + 4);
    to.scale[g] = byte(rest >> 28);
    for (size_t l = 0; l < 4; ++l)
      unpack_entry(grid, from[l], all_signs(rest >> 7 * l & 127), to.codes + 32 * g + 8 * l);
  }
}
void pack_iq2_xxs(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq2_xxs");
  std::copy_n(from.scale_scale, kHalf, block);
  for (size_t g = 0; g < 8; ++g) {
    uint8_t* const to = block + kHalf + 8 * g;
    uint32_t rest = static_cast<uint32_t>(from.scale[g]) << 28;
    for (size_t l = 0; l < 4; ++l) {
      const uint8_t* const codes = from.codes + 32 * g + 8 * l;
      to[l] = byte(index_of(grid, codes));
      rest |= (signs_of(codes) & 127) << 7 * l;
    }
    put(to + 4, rest);
  }
}

// IQ2_XS: d | 32 times index | 7 signs << 9 | 8 bytes of scales
void unpack_iq2_xs(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq2_xs");
  std::copy_n(block, kHalf, to.scale_scale);
  for (size_t i = 0; i < 32; ++i) {
    const unsigned word = u16_at(block + kHalf + 2 * i);
    unpack_entry(grid, word & 511, all_signs(word >> 9), to.codes + 8 * i);
  }
  for (size_t g = 0; g < 16; ++g) to.scale[g] = block[66 + g / 2] >> 4 * (g % 2) & 15;
}
void pack_iq2_xs(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq2_xs");
  std::copy_n(from.scale_scale, kHalf, block);
  for (size_t i = 0; i < 32; ++i) {
    const uint8_t* const codes = from.codes + 8 * i;
    put(block + kHalf + 2 * i, static_cast<uint16_t>(index_of(grid, codes) | (signs_of(codes) & 127) << 9));
  }
  for (size_t g = 0; g < 8; ++g) block[66 + g] = byte(from.scale[2 * g] | from.scale[2 * g + 1] << 4);
}

// IQ2_S: d | 32 lower bytes of indices | 32 bytes of signs | 8 bytes of upper 2 bits | 8 bytes of scales
void unpack_iq2_s(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq2_s");
  std::copy_n(block, kHalf, to.scale_scale);
  for (size_t i = 0; i < 32; ++i) {
    const unsigned high = block[66 + i / 4] >> 2 * (i % 4) & 3u;
    unpack_entry(grid, block[2 + i] | high << 8, block[34 + i], to.codes + 8 * i);
  }
  for (size_t g = 0; g < 16; ++g) to.scale[g] = block[74 + g / 2] >> 4 * (g % 2) & 15;
}
void pack_iq2_s(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq2_s");
  std::copy_n(from.scale_scale, kHalf, block);
  std::fill_n(block + 66, 8, uint8_t{0});
  for (size_t i = 0; i < 32; ++i) {
    const uint8_t* const codes = from.codes + 8 * i;
    const unsigned index = index_of(grid, codes);
    block[2 + i] = byte(index);
    block[34 + i] = byte(signs_of(codes));
    block[66 + i / 4] = byte(block[66 + i / 4] | index >> 8 << 2 * (i % 4));
  }
  for (size_t g = 0; g < 8; ++g) block[74 + g] = byte(from.scale[2 * g] | from.scale[2 * g + 1] << 4);
}

// IQ3_XXS: d | 64 indices | for each 32 codes: 4 times 7 signs, scale << 28
void unpack_iq3_xxs(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq3_xxs");
  std::copy_n(block, kHalf, to.scale_scale);
  for (size_t g = 0; g < 8; ++g) {
    const uint32_t rest = u32_at(block + 66 + 4 * g);
    to.scale[g] = byte(rest >> 28);
    for (size_t l = 0; l < 8; ++l) {
      const unsigned signs = all_signs(rest >> 7 * (l / 2) & 127) >> 4 * (l % 2);
      unpack_entry(grid, block[kHalf + 8 * g + l], signs, to.codes + 32 * g + 4 * l);
    }
  }
}
void pack_iq3_xxs(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq3_xxs");
  std::copy_n(from.scale_scale, kHalf, block);
  for (size_t g = 0; g < 8; ++g) {
    uint32_t rest = static_cast<uint32_t>(from.scale[g]) << 28;
    for (size_t l = 0; l < 8; ++l) block[kHalf + 8 * g + l] = byte(index_of(grid, from.codes + 32 * g + 4 * l));
    for (size_t l = 0; l < 4; ++l) rest |= (signs_of(from.codes + 32 * g + 8 * l) & 127) << 7 * l;
    put(block + 66 + 4 * g, rest);
  }
}

// IQ3_S: d | 64 lower bytes of indices | 8 bytes of their ninth bits | 32 bytes of signs | 4 bytes of scales
void unpack_iq3_s(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq3_s");
  std::copy_n(block, kHalf, to.scale_scale);
  for (size_t i = 0; i < 64; ++i) {
    const unsigned high = block[66 + i / 8] >> i % 8 & 1u;
    const unsigned signs = static_cast<unsigned>(block[74 + i / 2]) >> 4 * (i % 2);
    unpack_entry(grid, block[2 + i] | high << 8, signs, to.codes + 4 * i);
  }
  for (size_t g = 0; g < 8; ++g) to.scale[g] = block[106 + g / 2] >> 4 * (g % 2) & 15;
}
void pack_iq3_s(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq3_s");
  std::copy_n(from.scale_scale, kHalf, block);
  std::fill_n(block + 66, 8, uint8_t{0});
  for (size_t i = 0; i < 64; ++i) {
    const unsigned index = index_of(grid, from.codes + 4 * i);
    block[2 + i] = byte(index);
    block[66 + i / 8] = byte(block[66 + i / 8] | index >> 8 << i % 8);
  }
  for (size_t i = 0; i < 32; ++i) block[74 + i] = byte(signs_of(from.codes + 8 * i));
  for (size_t g = 0; g < 4; ++g) block[106 + g] = byte(from.scale[2 * g] | from.scale[2 * g + 1] << 4);
}

// IQ1_S: d | 32 lower bytes of indices | for each 32 codes: 4 times their upper 3 bits, scale << 12, sign << 15
void unpack_iq1_s(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq1");
  std::copy_n(block, kHalf, to.scale_scale);
  for (size_t g = 0; g < 8; ++g) {
    const unsigned rest = u16_at(block + 34 + 2 * g);
    to.scale[g] = rest >> 12 & 7;
    for (size_t l = 0; l < 4; ++l)
      unpack_entry(grid, block[2 + 4 * g + l] | (rest >> 3 * l & 7) << 8, (rest >> 15) * 255,
                   to.codes + 32 * g + 8 * l);
  }
}
void pack_iq1_s(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq1");
  std::copy_n(from.scale_scale, kHalf, block);
  for (size_t g = 0; g < 8; ++g) {
    unsigned rest = static_cast<unsigned>(from.scale[g]) << 12 | static_cast<unsigned>(from.codes[32 * g] / kSign)
                                                                     << 15;
    for (size_t l = 0; l < 4; ++l) {
      const unsigned index = index_of(grid, from.codes + 32 * g + 8 * l);
      block[2 + 4 * g + l] = byte(index);
      rest |= index >> 8 << 3 * l;
    }
    put(block + 34 + 2 * g, static_cast<uint16_t>(rest));
  }
}

// IQ1_M: 32 lower bytes of indices | 32 nibbles, their upper 3 bits, sign << 3 | 4 words, 4 scales of 3 bits and above
// them a nibble of d
void unpack_iq1_m(const uint8_t* block, const BlockParts& to) {
  static const GgufGrid& grid = gguf_grid("iq1");
  unsigned d = 0;
  for (size_t w = 0; w < 4; ++w) {
    const unsigned word = u16_at(block + 48 + 2 * w);
    d |= word >> 12 << 4 * w;
    for (size_t g = 0; g < 4; ++g) to.scale[4 * w + g] = word >> 3 * g & 7;
  }
  put(to.scale_scale, static_cast<uint16_t>(d));
  for (size_t i = 0; i < 32; ++i) {
    const unsigned nibble = block[32 + i / 2] >> 4 * (i % 2) & 15u;
    unpack_entry(grid, block[i] | (nibble & 7) << 8, (nibble >> 3) * 255, to.codes + 8 * i);
  }
}
void pack_iq1_m(const BlockParts& from, uint8_t* block) {
  static const GgufGrid& grid = gguf_grid("iq1");
  std::fill_n(block + 32, 16, uint8_t{0});
  for (size_t i = 0; i < 32; ++i) {
    const unsigned index = index_of(grid, from.codes + 8 * i);
    const unsigned nibble = index >> 8 | static_cast<unsigned>(from.codes[8 * i] / kSign) << 3;
    block[i] = byte(index);
    block[32 + i / 2] = byte(block[32 + i / 2] | nibble << 4 * (i % 2));
  }
  const unsigned d = u16_at(from.scale_scale);
  for (size_t w = 0; w < 4; ++w) {
    unsigned word = (d >> 4 * w & 15) << 12;
    for (size_t g = 0; g < 4; ++g) word |= static_cast<unsigned>(from.scale[4 * w + g]) << 3 * g;
    put(block + 48 + 2 * w, static_cast<uint16_t>(word));
  }
}

constexpr auto kCodecs = std::to_array<BlockCodec>({
    {"Q8_0", q8_0, unpack_q8_0, pack_q8_0},
    {"Q4_0", q4_0, unpack_scaled_nibbles<kHalf>, pack_scaled_nibbles<kHalf>},
    {"Q4_1", q4_1, unpack_q4_1, pack_q4_1},
    {"Q5_0", q5_0, unpack_q5_0, pack_q5_0},
    {"Q5_1", q5_1, unpack_q5_1, pack_q5_1},
    {"Q2_K", q2_k, unpack_q2_k, pack_q2_k},
    {"Q3_K", q3_k, unpack_q3_k, pack_q3_k},
    {"Q4_K", q4_k, unpack_q4_k, pack_q4_k},
    {"Q5_K", q5_k, unpack_q5_k, pack_q5_k},
    {"Q6_K", q6_k, unpack_q6_k, pack_q6_k},
    {"IQ4_NL", iq4_nl, unpack_scaled_nibbles<kHalf>, pack_scaled_nibbles<kHalf>},
    {"IQ4_XS", iq4_xs, unpack_iq4_xs, pack_iq4_xs},
    {"IQ2_XXS", iq2_xxs, unpack_iq2_xxs, pack_iq2_xxs},
    {"IQ2_XS", iq2_xs, unpack_iq2_xs, pack_iq2_xs},
    {"IQ2_S", iq2_s, unpack_iq2_s, pack_iq2_s},
    {"IQ3_XXS", iq3_xxs, unpack_iq3_xxs, pack_iq3_xxs},
    {"IQ3_S", iq3_s, unpack_iq3_s, pack_iq3_s},
    {"IQ1_S", iq1_s, unpack_iq1_s, pack_iq1_s},
    {"IQ1_M", iq1_m, unpack_iq1_m, pack_iq1_m},
    {"MXFP4", mxfp4, unpack_scaled_nibbles<1>, pack_scaled_nibbles<1>},
    {"NVFP4", nvfp4, unpack_nvfp4, pack_nvfp4},
    {"TQ1_0", tq1_0, unpack_tq1_0, pack_tq1_0},
    {"TQ2_0", tq2_0, unpack_tq2_0, pack_tq2_0},
    {"Q1_0", q1_0, unpack_dense<kOnes, 1>, pack_dense<kOnes, 1>},
    {"Q2_0", q2_0, unpack_dense<kTwos, 2>, pack_dense<kTwos, 2>},
});

}  // namespace

std::span<const BlockCodec> all_block_codecs() { return kCodecs; }

const BlockCodec* find_block_codec(std::string_view type) {
  const auto found = std::ranges::find(kCodecs, type, &BlockCodec::type);
  return found == kCodecs.end() ? nullptr : &*found;
}

const BlockCodec* find_block_codec(const Scheme& scheme) {
  static const auto schemes = [] {
    std::array<Scheme, kCodecs.size()> all;
    std::ranges::transform(kCodecs, all.begin(), [](const BlockCodec& codec) { return codec.scheme(); });
    return all;
  }();
  const auto found = std::ranges::find(schemes, scheme);
  return found == schemes.end() ? nullptr : &kCodecs.at(static_cast<size_t>(found - schemes.begin()));
}

namespace {

std::shared_ptr<QuantizedTensor> parameter_tensor(const std::optional<Parameter>& parameter, const Shape& shape) {
  if (!parameter) return nullptr;
  auto t = std::make_shared<QuantizedTensor>();
  t->scheme = *parameter->scheme;
  t->shape = parameter_shape(parameter->grouping, shape);
  t->codes.resize(static_cast<size_t>(element_count(t->shape)) * t->scheme.element->code_bytes());
  t->scale = parameter_tensor(t->scheme.scale, t->shape);
  return t;
}

}  // namespace

QuantizedTensor block_tensor(const Scheme& scheme, const Shape& shape) {
  return {.scheme = scheme,
          .shape = shape,
          .codes = std::vector<std::byte>(static_cast<size_t>(element_count(shape))),
          .scale = parameter_tensor(scheme.scale, shape),
          .offset = parameter_tensor(scheme.offset, shape)};
}

TensorBlocks::TensorBlocks(const QuantizedTensor& t, size_t blocks) {
  const auto part = [&](const QuantizedTensor* from) {
    if (from == nullptr || blocks == 0) return Part{};
    BW_ASSERT(from->codes.size() % blocks == 0);
    std::byte* const data = const_cast<std::byte*>(from->codes.data());
    return Part{reinterpret_cast<uint8_t*>(data), from->codes.size() / blocks};
  };
  const auto scale_of = [](const QuantizedTensor* p) { return p == nullptr ? nullptr : p->scale.get(); };
  const QuantizedTensor *const scale = t.scale.get(), *const offset = t.offset.get();
  all_ = {part(&t), part(scale), part(scale_of(scale)), part(offset), part(scale_of(offset))};
}

}  // namespace bitwright
