#include "container/bits.hpp"

#include "base/error.hpp"

namespace bitwright {

std::vector<std::byte> pack_bits(std::span<const std::byte> codes, int bits) {
  std::vector<std::byte> out;
  out.reserve(packed_bytes(codes.size(), bits));
  uint32_t pending = 0;
  int held = 0;
  for (const std::byte code : codes) {
    pending |= std::to_integer<uint32_t>(code) << held;
    for (held += bits; held >= 8; held -= 8, pending >>= 8) out.push_back(static_cast<std::byte>(pending & 0xff));
  }
  if (held > 0) out.push_back(static_cast<std::byte>(pending & 0xff));
  return out;
}

std::vector<std::byte> unpack_bits(std::span<const std::byte> packed, int bits, uint64_t count) {
  BW_ASSERT(packed.size() >= packed_bytes(count, bits));
  std::vector<std::byte> codes(count);
  const uint32_t mask = (1u << bits) - 1;
  uint32_t pending = 0;
  int held = 0;
  size_t next = 0;
  for (std::byte& code : codes) {
    if (held < bits) {
      pending |= std::to_integer<uint32_t>(packed[next++]) << held;
      held += 8;
    }
    code = static_cast<std::byte>(pending & mask);
    pending >>= bits;
    held -= bits;
  }
  return codes;
}

}  // namespace bitwright
