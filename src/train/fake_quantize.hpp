#pragma once

#include <torch/torch.h>

#include <functional>
#include <optional>

#include "scheme/quantized_linear.hpp"
#include "scheme/range.hpp"

namespace bitwright::train {

/// Integer codes whose scales (and zero points) are given: those a model learns, or of calibrated activations.
struct IntegerGrid {
  Grouping grouping;      ///< consecutive elements: tensor, channel, along(n), flat(n)
  float lowest, highest;  ///< codes in use
};
/// The grid of a scheme; nothing unless it has integers with plain scales of floats, no offset or a zero point, and
/// groups of consecutive elements.
std::optional<IntegerGrid> integer_grid(const Scheme& scheme);

/// y = (clamp(rint(x * (1 / s)) + z, lowest, highest) - z) * s: PyTorch's fake_quantize_per_tensor_affine and
/// _per_channel_affine, for groups too. x: f32, bf16 or f16; y: of x's type unless `type` says another.
/// scale: f32, one a group (any shape); zero: the same, whole numbers, or undefined: 0.
/// Gradients: of x straight through where the code is not clipped, else 0; of scale (LSQ: Esser et al. 2020, eq. 3) and
/// zero those of PyTorch's _fake_quantize_learnable_*, times gradient_factor; LSQ's is lsq_factor().
torch::Tensor fake_quantize(const torch::Tensor& x, const torch::Tensor& scale, const torch::Tensor& zero,
                            const IntegerGrid& grid, double gradient_factor = 1,
                            c10::optional<torch::ScalarType> type = c10::nullopt);

/// 1 / sqrt(N * Qp), N the elements of a group (Esser et al. 2020, section 2.2).
double lsq_factor(const IntegerGrid& grid, torch::IntArrayRef shape);
/// 2 * mean|x| / sqrt(Qp) of each group (the same, section 2.1). Shape: [groups].
torch::Tensor lsq_scales(const torch::Tensor& x, const IntegerGrid& grid);

/// x's codes with given scales, as fake_quantize chooses them. scheme: one that has an integer_grid; scale and zero are
/// rounded to what it stores. decode() of the result is fake_quantize() bit for bit if they are stored already.
QuantizedTensor quantize_with(const Scheme& scheme, const torch::Tensor& x, const torch::Tensor& scale,
                              const torch::Tensor& zero);

/// scale as a model stores it, in f32: rounded to `type` (f16, bf16, f32) and at least its smallest normal number.
/// Straight through.
torch::Tensor stored_scale(const torch::Tensor& scale, DType type);
/// Whole numbers within [lowest, highest]; straight through.
torch::Tensor stored_zero(const torch::Tensor& zero, const IntegerGrid& grid);

/// How floats become codes whose scales come from the values themselves.
using Quantize = std::function<QuantizedTensor(const torch::Tensor& contiguous)>;
/// decode(quantize(x)), of x's type unless `type` says another. The gradient is straight through; where `clips`
/// (ranges are searched, not the extremes), it is 0 for what is beyond its group's range.
torch::Tensor fake_quantize(const torch::Tensor& x, const Quantize& quantize, bool clips = false,
                            c10::optional<torch::ScalarType> type = c10::nullopt);
/// encode() of kernels/ with this scheme and rule.
Quantize quantizer(const Scheme& scheme, RangeRule rule = RangeRule::minmax);

/// What a layer does to its inputs, without learning: dynamic, or with stored scales. x: [..., features]; groups act
/// within the rows of [tokens, features].
torch::Tensor fake_quantize_activation(const torch::Tensor& x, const ActivationScheme& activation);
/// Scales that are stored once and for all, for values in this range.
ActivationScheme fixed_activation(const Scheme& scheme, Range range);

}  // namespace bitwright::train
