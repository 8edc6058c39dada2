#include "container/weights.hpp"

#include <cmath>
#include <string>

#include "base/error.hpp"
#include "base/vectorized.hpp"
#include "scheme/range.hpp"

namespace bitwright {

void check_weight_dtype(DType dtype, std::string_view owner) {
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return;
  throw Error({.code = "bad-tensor",
               .what = "cannot quantize",
               .why = std::string(owner) + " takes weights of 16 and 32 bits, this is " + std::string(info(dtype).name),
               .fix = "convert the model, for example by `bitwright dequantize --dtype float32`"});
}

BITWRIGHT_VECTORIZED
float absmax_of(std::span<const float> values) { return largest_magnitude(values.data(), values.size()); }

void check_finite(std::span<const float> values, size_t first) {
  if (std::isfinite(absmax_of(values))) return;
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i])) throw_not_finite(static_cast<int64_t>(first + i), values[i]);
}

std::vector<float> finite_values(WeightView weight, size_t begin, size_t end) {
  const size_t bytes = size_bytes(weight.dtype);
  std::vector<float> values(end - begin);
  to_f32(weight.dtype, weight.bytes.subspan(begin * bytes, (end - begin) * bytes), values);
  check_finite(values, begin);
  return values;
}

std::shared_ptr<const QuantizedTensor> plain_tensor(std::span<const float> values, const Shape& shape) {
  const auto bytes = std::as_bytes(values);
  return std::make_shared<QuantizedTensor>(
      QuantizedTensor{.scheme = plain(DType::f32), .shape = shape, .codes = {bytes.begin(), bytes.end()}});
}

}  // namespace bitwright
