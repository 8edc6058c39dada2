#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// How a group's range is chosen: its smallest and largest value, or the one with the least squared error.
enum class RangeRule : uint8_t { minmax, mse };

/// Of least_squares_range, for the kernels that follow it bit by bit.
struct RangeSearch {
  static constexpr float kStep = 1.0f / 64;        ///< range k is the whole one times 1 - k * kStep
  static constexpr int kStride = 4, kReach = 48;   ///< k = 0, 4 … 44 are tried first
  static constexpr float kHopeless = 1.5f;         ///< … until the error is this many times the least
  static constexpr int kRefinements[] = {2, 1};    ///< then the best k less and plus 2, then 1
  static constexpr size_t kPiece = 256;            ///< values whose squared errors are summed in f32
  static constexpr float kRound = 12582912.0f;     ///< 1.5 * 2^23: adding it rounds to an integer, ties to even
  static constexpr float kLeastScale = 0x1p-126f;  ///< below it the reciprocal would overflow: counted as 0
};

/// The range r * [low, high], r <= 1, with the least squared error, found from coarse to fine. Clipping a group's
/// outliers buys finer steps for the rest. The error has one deep valley, so that 48 ranges need about 9 trials: the
/// squared error of real weights is then within 0.1 % of the best of all 48.
Range least_squares_range(const Scheme& scheme, std::span<const float> values);

/// The ChooseRange of `rule`.
Range choose_range(RangeRule rule, const Scheme& scheme, std::span<const float> values);

/// Scales and zero points of all groups: as they are stored, and as codes are chosen with.
struct ChosenParameters {
  std::shared_ptr<const QuantizedTensor> scale{}, offset{};
  std::vector<float> scales{}, zeros{};  ///< one a group; zeros: empty where the scheme has none
};
/// The definition's second step. ranges: one a group. Throws Error{"scale-overflow"}.
ChosenParameters encode_parameters(const Scheme& scheme, const Shape& shape, std::span<const Range> ranges);

/// Throws Error{"not-finite"} for the element at row-major position `index`.
[[noreturn]] void throw_not_finite(int64_t index, float value);
/// Throws Error{"scale-overflow"}.
[[noreturn]] void throw_scale_overflow(float scale, std::string_view type);

}  // namespace bitwright
