#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

// What the owners' ways of rounding weights share.

/// Throws Error{"bad-tensor"} unless weights are f32, f16 or bf16. owner: "MLX".
void check_weight_dtype(DType dtype, std::string_view owner);

/// The largest magnitude; NaN or infinity if there is one among them. 0 where there are none.
float absmax_of(std::span<const float> values);

/// The same, inside a loop that is compiled for several instruction sets. By their bits, which order magnitudes as
/// integers: unlike a maximum of floats, the compiler makes a vector loop of it.
[[gnu::always_inline]] inline float largest_magnitude(const float* values, size_t count) {
  constexpr int32_t kMagnitude = 0x7fffffff;
  int32_t most = 0;
  for (size_t i = 0; i < count; ++i) {
    const int32_t bits = std::bit_cast<int32_t>(values[i]) & kMagnitude;
    most = bits > most ? bits : most;
  }
  return std::bit_cast<float>(most);
}

/// Throws Error{"not-finite"} naming the first element that is not; values[0] is number `first`.
void check_finite(std::span<const float> values, size_t first);

/// Elements [begin, end), all finite, or Error{"not-finite"}.
std::vector<float> finite_values(WeightView weight, size_t begin, size_t end);

/// Numbers as a parameter stores them: plain f32.
std::shared_ptr<const QuantizedTensor> plain_tensor(std::span<const float> values, const Shape& shape);

}  // namespace bitwright
