#include <algorithm>
#include <array>
#include <bit>

#include "base/error.hpp"
#include "scheme/rows.hpp"

namespace bitwright {
namespace {

template <DType dtype>
float decode(const ElementType& type, uint32_t code) {
  float value = 0;
  const auto bytes = std::as_bytes(std::span(&code, 1)).first(static_cast<size_t>(type.bits) / 8);
  to_f32(dtype, bytes, std::span(&value, 1));
  return value;
}

/// Saturates: a weight beyond the range becomes the largest value, never an infinity.
template <DType dtype>
uint32_t nearest(const ElementType& type, float value) {
  const float clamped = std::clamp(value, type.lowest, type.highest);
  uint32_t code = 0;
  from_f32(dtype, std::span(&clamped, 1),
           std::as_writable_bytes(std::span(&code, 1)).first(static_cast<size_t>(type.bits) / 8));
  return code;
}

template <DType dtype>
constexpr ElementType row(std::string_view name, int bits, float lowest, float highest) {
  return {.name = name,
          .source = "IEEE 754; OCP 8-bit floating point 1.0; OCP microscaling formats 1.0",
          .kind = ElementKind::floating,
          .bits = bits,
          .lowest = lowest,
          .highest = highest,
          .full_scale = highest,
          .decode = decode<dtype>,
          .nearest = nearest<dtype>};
}

constexpr float kF32Max = std::bit_cast<float>(0x7f7fffffu);
constexpr float kBF16Max = std::bit_cast<float>(0x7f7f0000u);

constexpr std::array<ElementType, 6> kFloats = {{
    row<DType::f32>("float32", 32, -kF32Max, kF32Max),
    row<DType::f16>("float16", 16, -65504.0f, 65504.0f),
    row<DType::bf16>("bfloat16", 16, -kBF16Max, kBF16Max),
    row<DType::f8_e4m3>("float8_e4m3", 8, -448.0f, 448.0f),
    row<DType::f8_e5m2>("float8_e5m2", 8, -57344.0f, 57344.0f),
    row<DType::f8_e8m0>("float8_e8m0", 8, 0x1p-127f, 0x1p127f),
}};

}  // namespace

const std::span<const ElementType> floating_rows = kFloats;

const ElementType& float_element(DType dtype) {
  const ElementType* found = find_element(info(dtype).name);
  BW_ASSERT(found != nullptr && found->kind == ElementKind::floating);
  return *found;
}

std::optional<DType> dtype_of(const ElementType& type) {
  if (type.kind == ElementKind::table || type.kind == ElementKind::block_code) return std::nullopt;
  return dtype_from_name(type.name);
}

}  // namespace bitwright
