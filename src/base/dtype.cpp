#include "base/dtype.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.hpp"
#include "base/vectorized.hpp"

namespace bitwright {
namespace {

constexpr int64_t kMaxElements = INT64_MAX / 64;  // 64 bits each can still be counted

constexpr std::array<DTypeInfo, 16> kDTypes = {{
    {DType::f64, "float64", "F64", 8, true},
    {DType::f32, "float32", "F32", 4, true},
    {DType::f16, "float16", "F16", 2, true},
    {DType::bf16, "bfloat16", "BF16", 2, true},
    {DType::f8_e4m3, "float8_e4m3", "F8_E4M3", 1, true},
    {DType::f8_e5m2, "float8_e5m2", "F8_E5M2", 1, true},
    {DType::f8_e8m0, "float8_e8m0", "F8_E8M0", 1, true},
    {DType::i64, "int64", "I64", 8, false},
    {DType::i32, "int32", "I32", 4, false},
    {DType::i16, "int16", "I16", 2, false},
    {DType::i8, "int8", "I8", 1, false},
    {DType::u64, "uint64", "U64", 8, false},
    {DType::u32, "uint32", "U32", 4, false},
    {DType::u16, "uint16", "U16", 2, false},
    {DType::u8, "uint8", "U8", 1, false},
    {DType::boolean, "bool", "BOOL", 1, false},
}};

/// A binary floating-point type narrower than f32: 1 sign bit, then exponent, then mantissa.
struct NarrowFloat {
  int exponent_bits;
  int mantissa_bits;
  uint32_t overflow;  ///< bits (without sign) of what is too large; for e4m3 NaN
  uint32_t largest;   ///< bits of the largest finite value
  uint32_t nan;
};
constexpr NarrowFloat kF16 = {5, 10, 0x7c00, 0x7bff, 0x7e00};
constexpr NarrowFloat kE4M3 = {4, 3, 0x7f, 0x7e, 0x7f};
constexpr NarrowFloat kE5M2 = {5, 2, 0x7c, 0x7b, 0x7f};

/// Round to nearest even by adding half of the last place to the f32 bits; subnormal results through a f32 addition
/// whose last place is the target's.
template <NarrowFloat type>
uint32_t encode(float value) {
  constexpr int kBias = (1 << (type.exponent_bits - 1)) - 1;
  constexpr int kShift = 23 - type.mantissa_bits;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 31) << (type.exponent_bits + type.mantissa_bits);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | type.nan;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(127 - kBias + 1) << 23;
  if (magnitude < kSmallestNormal) {
    constexpr uint32_t kMagic = static_cast<uint32_t>(127 - kBias + 1 + kShift) << 23;
    const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kMagic);
    return sign | (std::bit_cast<uint32_t>(sum) - kMagic);
  }
  const uint32_t odd = (magnitude >> kShift) & 1;
  const uint32_t rounded = magnitude + ((1u << (kShift - 1)) - 1) + odd;
  const uint32_t result = (rounded >> kShift) - (static_cast<uint32_t>(127 - kBias) << type.mantissa_bits);
  return sign | (result > type.largest ? type.overflow : result);
}

template <NarrowFloat type>
float decode(uint32_t bits) {
  constexpr int kBias = (1 << (type.exponent_bits - 1)) - 1;
  const uint32_t exponent = (bits >> type.mantissa_bits) & ((1u << type.exponent_bits) - 1);
  const uint32_t mantissa = bits & ((1u << type.mantissa_bits) - 1);
  const float sign = (bits >> (type.exponent_bits + type.mantissa_bits)) != 0 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - kBias - type.mantissa_bits);
  return sign * std::ldexp(static_cast<float>(mantissa + (1u << type.mantissa_bits)),
                           static_cast<int>(exponent) - kBias - type.mantissa_bits);
}

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class Stored, class Convert>
void read_all(std::span<const std::byte> data, std::span<float> out, Convert convert) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = convert(load<Stored>(data.data() + i * sizeof(Stored)));
}

BITWRIGHT_VECTORIZED
void read_f16(std::span<const std::byte> data, std::span<float> out) { read_all<uint16_t>(data, out, f16_to_f32); }

BITWRIGHT_VECTORIZED
void read_bf16(std::span<const std::byte> data, std::span<float> out) { read_all<uint16_t>(data, out, bf16_to_f32); }

/// Of one byte: from a table.
template <float (*convert)(uint8_t)>
void read_f8(std::span<const std::byte> data, std::span<float> out) {
  static const auto values = [] {
    std::array<float, 256> all = {};
    for (size_t code = 0; code < all.size(); ++code) all.at(code) = convert(static_cast<uint8_t>(code));
    return all;
  }();
  read_all<uint8_t>(data, out, [&](uint8_t code) { return values[code]; });
}

template <class Stored, class Convert>
void write_all(std::span<const float> values, std::span<std::byte> data, Convert convert) {
  for (size_t i = 0; i < values.size(); ++i) {
    const Stored stored = convert(values[i]);
    std::memcpy(data.data() + i * sizeof stored, &stored, sizeof stored);
  }
}

template <class T>
T saturate(float value) {
  if (std::isnan(value)) return 0;
  const double rounded = std::nearbyint(static_cast<double>(value));
  if (rounded <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (rounded >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(rounded);
}

}  // namespace

static_assert(std::endian::native == std::endian::little, "files are little-endian and read as they are");

std::span<const DTypeInfo> all_dtypes() { return kDTypes; }

const DTypeInfo& info(DType dtype) { return kDTypes.at(static_cast<size_t>(dtype)); }

std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const DTypeInfo& d : kDTypes)
    if (d.safetensors == name) return d.dtype;
  return std::nullopt;
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DTypeInfo& d : kDTypes)
    if (d.name == name) return d.dtype;
  return std::nullopt;
}

std::optional<int64_t> checked_element_count(const Shape& shape) {
  // An empty dimension hides the others in the product, but not in what is computed from them one by one.
  int64_t count = 1;
  bool is_empty = false;
  for (const int64_t dim : shape) {
    is_empty = is_empty || dim == 0;
    if (dim < 0 || (dim > 0 && __builtin_mul_overflow(count, dim, &count)) || count > kMaxElements) return std::nullopt;
  }
  return is_empty ? 0 : count;
}

int64_t element_count(const Shape& shape) {
  const auto count = checked_element_count(shape);
  BW_ASSERT(count.has_value());
  return *count;
}

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

float f16_to_f32(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  // Subnormals as multiples of 2^-24: an f32 subnormal on the way would cost the processor a hundred cycles.
  const uint32_t small = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t bias = magnitude < 0x7c00 ? uint32_t{112} << 23 : uint32_t{224} << 23;  // infinity, NaN: all ones
  const uint32_t is_small = 0u - static_cast<uint32_t>(magnitude < 0x400);  // a mask, so that loops become vectors
  const uint32_t found = (small & is_small) | (((magnitude << 13) + bias) & ~is_small);
  return std::bit_cast<float>(found | (static_cast<uint32_t>(bits & 0x8000) << 16));
}

uint16_t f32_to_f16(float value) { return static_cast<uint16_t>(encode<kF16>(value)); }

float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 64);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float e4m3_to_f32(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return decode<kE4M3>(bits);
}

uint8_t f32_to_e4m3(float value) { return static_cast<uint8_t>(encode<kE4M3>(value)); }

float e5m2_to_f32(uint8_t bits) { return f16_to_f32(static_cast<uint16_t>(bits << 8)); }

uint8_t f32_to_e5m2(float value) { return static_cast<uint8_t>(encode<kE5M2>(value)); }

float e8m0_to_f32(uint8_t bits) {
  if (bits == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::ldexp(1.0f, bits - 127);
}

uint8_t f32_to_e8m0(float value) {
  if (std::isnan(value) || std::isinf(value) || value < 0) return 255;
  if (value == 0) return 0;
  int exponent = 0;
  const float mantissa = std::frexp(value, &exponent);  // value = mantissa * 2^exponent, mantissa in [0.5, 1)
  const int nearest = mantissa >= 0.75f ? exponent : exponent - 1;
  return static_cast<uint8_t>(std::min(std::max(nearest + 127, 0), 254));
}

void to_f32(DType dtype, std::span<const std::byte> data, std::span<float> out) {
  BW_ASSERT(data.size() == out.size() * size_bytes(dtype));
  if (out.empty()) return;
  const auto plain = [](auto value) { return static_cast<float>(value); };
  switch (dtype) {
    case DType::f64:
      return read_all<double>(data, out, plain);
    case DType::f32:
      std::memcpy(out.data(), data.data(), data.size());
      return;
    case DType::f16:
      return read_f16(data, out);
    case DType::bf16:
      return read_bf16(data, out);
    case DType::f8_e4m3:
      return read_f8<e4m3_to_f32>(data, out);
    case DType::f8_e5m2:
      return read_f8<e5m2_to_f32>(data, out);
    case DType::f8_e8m0:
      return read_f8<e8m0_to_f32>(data, out);
    case DType::i64:
      return read_all<int64_t>(data, out, plain);
    case DType::i32:
      return read_all<int32_t>(data, out, plain);
    case DType::i16:
      return read_all<int16_t>(data, out, plain);
    case DType::i8:
      return read_all<int8_t>(data, out, plain);
    case DType::u64:
      return read_all<uint64_t>(data, out, plain);
    case DType::u32:
      return read_all<uint32_t>(data, out, plain);
    case DType::u16:
      return read_all<uint16_t>(data, out, plain);
    case DType::u8:
    case DType::boolean:
      return read_all<uint8_t>(data, out, plain);
  }
}

void from_f32(DType dtype, std::span<const float> values, std::span<std::byte> data) {
  BW_ASSERT(data.size() == values.size() * size_bytes(dtype));
  if (values.empty()) return;
  switch (dtype) {
    case DType::f64:
      return write_all<double>(values, data, [](float v) { return static_cast<double>(v); });
    case DType::f32:
      std::memcpy(data.data(), values.data(), data.size());
      return;
    case DType::f16:
      return write_all<uint16_t>(values, data, f32_to_f16);
    case DType::bf16:
      return write_all<uint16_t>(values, data, f32_to_bf16);
    case DType::f8_e4m3:
      return write_all<uint8_t>(values, data, f32_to_e4m3);
    case DType::f8_e5m2:
      return write_all<uint8_t>(values, data, f32_to_e5m2);
    case DType::f8_e8m0:
      return write_all<uint8_t>(values, data, f32_to_e8m0);
    case DType::i64:
      return write_all<int64_t>(values, data, saturate<int64_t>);
    case DType::i32:
      return write_all<int32_t>(values, data, saturate<int32_t>);
    case DType::i16:
      return write_all<int16_t>(values, data, saturate<int16_t>);
    case DType::i8:
      return write_all<int8_t>(values, data, saturate<int8_t>);
    case DType::u64:
      return write_all<uint64_t>(values, data, saturate<uint64_t>);
    case DType::u32:
      return write_all<uint32_t>(values, data, saturate<uint32_t>);
    case DType::u16:
      return write_all<uint16_t>(values, data, saturate<uint16_t>);
    case DType::u8:
      return write_all<uint8_t>(values, data, saturate<uint8_t>);
    case DType::boolean:
      return write_all<uint8_t>(values, data, [](float v) { return static_cast<uint8_t>(v != 0); });
  }
}

float round_to(DType dtype, float value) {
  std::array<std::byte, 8> stored;
  const std::span<std::byte> bytes = std::span(stored).first(size_bytes(dtype));
  from_f32(dtype, std::span(&value, 1), bytes);
  float rounded = 0;
  to_f32(dtype, bytes, std::span(&rounded, 1));
  return rounded;
}

}  // namespace bitwright
