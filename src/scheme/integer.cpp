#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.hpp"
#include "scheme/rows.hpp"

namespace bitwright {
namespace {

uint32_t mask(const ElementType& type) { return type.bits == 32 ? ~0u : (1u << type.bits) - 1; }

float decode_unsigned(const ElementType& type, uint32_t code) { return static_cast<float>(code & mask(type)); }

float decode_signed(const ElementType& type, uint32_t code) {
  const uint32_t sign = 1u << (type.bits - 1);
  return static_cast<float>(static_cast<int32_t>((code & mask(type)) ^ sign) - static_cast<int32_t>(sign));
}

/// Round half to even, clamped.
uint32_t nearest_integer(const ElementType& type, float value) {
  const float clamped = std::clamp(std::nearbyint(value), type.lowest, type.highest);
  return static_cast<uint32_t>(static_cast<int32_t>(clamped)) & mask(type);
}

constexpr std::array<std::string_view, 8> kUnsignedNames = {"uint1", "uint2", "uint3", "uint4",
                                                            "uint5", "uint6", "uint7", "uint8"};
constexpr std::array<std::string_view, 8> kSignedNames = {"int1", "int2", "int3", "int4",
                                                          "int5", "int6", "int7", "int8"};

constexpr ElementType row(int bits, bool is_signed) {
  const int highest = is_signed ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
  const int lowest = is_signed ? -(1 << (bits - 1)) : 0;
  const auto name = static_cast<size_t>(bits - 1);
  return {.name = is_signed ? kSignedNames.at(name) : kUnsignedNames.at(name),
          .source = "two's complement, round half to even",
          .kind = ElementKind::integer,
          .bits = bits,
          .lowest = static_cast<float>(lowest),
          .highest = static_cast<float>(highest),
          .full_scale = static_cast<float>(std::max(highest, 1)),
          .decode = is_signed ? decode_signed : decode_unsigned,
          .nearest = nearest_integer};
}

constexpr std::array<ElementType, 16> kIntegers = {row(1, false), row(2, false), row(3, false), row(4, false),
                                                   row(5, false), row(6, false), row(7, false), row(8, false),
                                                   row(1, true),  row(2, true),  row(3, true),  row(4, true),
                                                   row(5, true),  row(6, true),  row(7, true),  row(8, true)};

}  // namespace

const std::span<const ElementType> integer_rows = kIntegers;

const ElementType& integer_element(int bits, bool is_signed) {
  BW_ASSERT(bits >= 1 && bits <= 8);
  return kIntegers.at(static_cast<size_t>(bits - 1 + (is_signed ? 8 : 0)));
}

}  // namespace bitwright
