#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// Number types that files hold, little-endian. The order is that of `all_dtypes()`.
enum class DType : uint8_t {
  f64,
  f32,
  f16,
  bf16,
  f8_e4m3,
  f8_e5m2,
  f8_e8m0,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  boolean
};

struct DTypeInfo {
  DType dtype;
  std::string_view name;         ///< as users and config.json say it: "bfloat16"
  std::string_view safetensors;  ///< as safetensors says it: "BF16"
  uint8_t size_bytes;
  bool is_float;
};

std::span<const DTypeInfo> all_dtypes();
const DTypeInfo& info(DType dtype);
std::optional<DType> dtype_from_safetensors(std::string_view name);
std::optional<DType> dtype_from_name(std::string_view name);
inline size_t size_bytes(DType dtype) { return info(dtype).size_bytes; }

/// Dimensions, slowest first. An empty shape is a scalar with one element.
using Shape = std::vector<int64_t>;

/// Product of the dimensions, or nothing where one is negative or the product so large that its bits overflow.
std::optional<int64_t> checked_element_count(const Shape& shape);
/// The same for shapes that were checked when they were read.
int64_t element_count(const Shape& shape);
std::string to_string(const Shape& shape);  ///< "[4096, 256]"

// Exact conversions. To a narrower type: round to nearest, ties to even (IEEE 754; OCP 8-bit floating point
// specification 1.0 for e4m3 and e5m2; OCP microscaling formats 1.0 for e8m0).
float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value);  ///< overflow gives infinity; NaN stays NaN
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);  ///< NaN keeps its upper payload bits and becomes quiet
float e4m3_to_f32(uint8_t bits);
uint8_t f32_to_e4m3(float value);  ///< beyond 464 gives NaN (e4m3 has no infinity), as PyTorch does
float e5m2_to_f32(uint8_t bits);
uint8_t f32_to_e5m2(float value);  ///< overflow gives infinity
float e8m0_to_f32(uint8_t bits);   ///< 2^(bits-127); 255 is NaN
uint8_t f32_to_e8m0(
    float value);  ///< nearest power of two, ties to the larger; NaN, 0 and negatives give NaN, 2^-127, NaN

/// out[i] = value i of `data`, exactly where f32 can hold it, else rounded to nearest. data: out.size() values.
void to_f32(DType dtype, std::span<const std::byte> data, std::span<float> out);
/// data: values.size() numbers of `dtype`, each values[i] rounded as above; integers round half to even and saturate.
void from_f32(DType dtype, std::span<const float> values, std::span<std::byte> data);
/// `value` as `dtype` would hold it.
float round_to(DType dtype, float value);

}  // namespace bitwright
