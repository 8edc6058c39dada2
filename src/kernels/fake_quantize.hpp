#pragma once

#include <span>
#include <vector>

#include "kernels/encode.hpp"

namespace bitwright {

/// Integers with given scales, not stored: y = clamp(rint(x * (1 / s)), lowest - z, highest - z) * s, PyTorch's
/// fake_quantize. A scale of 0 makes all 0; NaN becomes the lowest.
struct FakeGroups {
  DType dtype;  ///< of values: f16, bf16 or f32
  const std::byte* values;
  size_t size, groups;  ///< `groups` times `size` consecutive values
  const float* scales;  ///< one a group
  const float* zeros;   ///< the same, whole numbers; null: 0
  float lowest, highest;
};

/// A whole tensor.
struct FakeTensor {
  WeightView values;
  GroupRuns runs;
  std::span<const float> scales, zeros;  ///< one a group; zeros: or empty
  float lowest, highest;
};

/// out: as many numbers of `type` (f16, bf16 or f32), each y rounded to it. In parallel.
void fake_quantize(const FakeTensor& t, DType type, std::byte* out, const KernelLevel& level = active_kernel_level());

/// Sums over each group, of which the gradients of scales and zero points are made.
struct FakeGradients {
  std::vector<float> scale;  ///< of gradient * (y - x) / s; of clipped values gradient * y / s
  std::vector<float> zero;   ///< of -s * gradient over clipped values
};
/// gradient: that of y, of its own type. out: that of x, of x's type: the same where the code is not clipped, else 0;
/// may be `gradient` where the types are equal. In parallel, summed in a fixed order.
FakeGradients fake_quantize_backward(const FakeTensor& t, WeightView gradient, std::byte* out,
                                     const KernelLevel& level = active_kernel_level());

// Of scalar_kernel_level: the definitions.
void fake_quantize_groups(const FakeGroups& q, DType type, std::byte* out);
void fake_quantize_gradients(const FakeGroups& q, DType type, const std::byte* gradient, std::byte* out,
                             float* scale_sums, float* clipped_sums);
/// The partial sums of kPanel lanes, pairwise.
float merge_lanes(float (&lanes)[kPanel]);

}  // namespace bitwright
