#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace bitwright {

/// Bytes of a dense stream of `count` codes of `bits` bits.
constexpr uint64_t packed_bytes(uint64_t count, int bits) { return (count * static_cast<uint64_t>(bits) + 7) / 8; }

/// codes: one a byte, low `bits` bits. Out: code i at bits [i * bits, (i + 1) * bits), least significant first;
/// a code may straddle bytes; the bits left over at the end are 0.
/// In parallel.
std::vector<std::byte> pack_bits(std::span<const std::byte> codes, int bits);

/// The same on this thread alone. out: packed_bytes(codes.size(), bits) bytes.
void pack_bits(std::span<const std::byte> codes, int bits, std::span<std::byte> out);

/// The inverse on this thread alone: codes.size() codes from at least packed_bytes(codes.size(), bits) bytes.
void unpack_bits(std::span<const std::byte> packed, int bits, std::span<std::byte> codes);

/// The inverse, in parallel: `count` codes from at least packed_bytes(count, bits) bytes.
std::vector<std::byte> unpack_bits(std::span<const std::byte> packed, int bits, uint64_t count);

/// 4-bit codes, two a byte, the first in the high half (bitsandbytes). In parallel. An odd last one has `filler` beside
/// it.
std::vector<std::byte> pack_high_first(std::span<const std::byte> codes, std::byte filler);
/// The inverse: `count` codes from at least (count + 1) / 2 bytes.
std::vector<std::byte> unpack_high_first(std::span<const std::byte> packed, uint64_t count);

}  // namespace bitwright
