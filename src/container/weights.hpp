#pragma once

#include <cstddef>
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

/// Throws Error{"not-finite"} naming the first element that is not; values[0] is number `first`.
void check_finite(std::span<const float> values, size_t first);

/// Elements [begin, end), all finite, or Error{"not-finite"}.
std::vector<float> finite_values(WeightView weight, size_t begin, size_t end);

/// Numbers as a parameter stores them: plain f32.
std::shared_ptr<const QuantizedTensor> plain_tensor(std::span<const float> values, const Shape& shape);

}  // namespace bitwright
