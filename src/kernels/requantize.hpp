#pragma once

#include <cstdint>
#include <span>

#include "kernels/philox.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

// Integer weights that learn: codes and scales are all there is of them. A change is added in units of the grid's
// step, so that a change of nothing leaves every code as it is, whatever the scale.
//
// Scales follow the weights by a rule of two sides:
// - a group of which a code would pass the last one gets a scale for its new range and 1/16 more;
// - a group whose codes have come to use less than half of the range gets one in the same way;
// - all others keep theirs, because a new scale rounds every code of the group anew.

enum class Rounding : uint8_t {
  stochastic,         ///< up with the probability that is the fraction
  error_compensated,  ///< to nearest; what is lost is kept in residuals
};

/// Steps of a residual in one step of the grid: a residual r stands for r / 254 steps, at most half a one.
constexpr float kResidualSteps = 254;

struct Requantize {
  Rounding rounding = Rounding::stochastic;
  float decay = 0;       ///< what of each weight is taken off first: lr * weight decay
  RandomStream first{};  ///< two streams of their own for every tensor and step
  RandomStream second{};
};

/// Does it hold for weights of this kind: integers in groups of consecutive elements, with plain f32, f16 or bf16
/// scales, and no offset or an integer zero point of each group?
bool can_requantize(const Scheme& scheme, const Shape& shape);

/// weight = weight - decay * weight + change, on the grid of its scheme again, in parallel. change: one number an
/// element, finite; overwritten. residual: one an element for error_compensated (0 at first), else empty.
/// Needs can_requantize. What comes out depends on nothing but the arguments.
void add_to_quantized(const Requantize& how, std::span<float> change, std::span<int8_t> residual,
                      QuantizedTensor& weight);

}  // namespace bitwright
