#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Rounds as MLX's kernels for Metal do (affine: those for CUDA too), bit for bit, in f32 whatever the weight's type:
/// what `mlx_lm.convert` writes on a Mac. MLX's CPU rounds ties to even instead of away from zero, begins a group's
/// maximum at its first value instead of at 0, never gives -0, and works in the weight's type.
/// scheme: one of MLX's that fits `shape`. Throws Error{"not-finite"}, {"scale-overflow"}, {"bad-tensor"}.
QuantizedTensor encode_mlx(const Scheme& scheme, const Shape& shape, WeightView weight);

}  // namespace bitwright
