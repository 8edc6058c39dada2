#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Chooses a group's parameters from its values and fills in its codes, one a byte. Called from several threads.
using RoundGroup = std::function<GroupParameters(std::span<const float> values, std::span<std::byte> codes)>;

/// The integer nearest to a value within [lowest, highest] (ties to even), both of at most 22 bits; lowest for NaN.
/// Written so that a loop of it becomes one of vectors.
inline int32_t nearest_within(float value, float lowest, float highest) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float above = value > lowest ? value : lowest;
  const float within = above < highest ? above : highest;
  return static_cast<int32_t>((within + kRound) - kRound);
}

/// A weight rounded group by group, by its owner's rule. scheme: integers or 8-bit floats with a plain scale and, where
/// there is an offset, a plain one of the same groups. The weight is first rounded to `arithmetic`, as a model that is
/// loaded in that type has it.
/// Throws Error{"not-finite"} with the position, Error{"scale-overflow"} where a parameter is not finite in its type,
/// Error{"bad-tensor"} for a weight that is not f32, f16 or bf16.
QuantizedTensor round_groups(const Scheme& scheme, const Shape& shape, WeightView weight, DType arithmetic,
                             const RoundGroup& round);

}  // namespace bitwright
