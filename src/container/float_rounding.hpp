#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// How a library rounds a group to e4m3.
struct Fp8Rule {
  struct Scale {
    float by;      ///< what values are multiplied with, or divided by
    float stored;  ///< what a code is multiplied with
  };
  /// From the group's largest magnitude and the weight's type. Both finite, `stored` positive.
  Scale (*scale)(float largest, DType weight);
  bool divides = false;
  bool in_weight_type = false;  ///< is the scaled value rounded to the weight's type first?
};

/// scheme: e4m3 with plain scales a matrix, row, group of a row or block. Where the scales are narrower than f32, codes
/// are chosen with the rounded ones. Throws Error{"not-finite"}, Error{"scale-overflow"}.
QuantizedTensor encode_fp8(const Scheme& scheme, const Shape& shape, WeightView weight, const Fp8Rule& rule);

/// NVFP4 as ModelOpt rounds it (NVFP4QTensor): scale_2 = largest / (6 * 448), a group's scale = its largest /
/// (6 * scale_2) in e4m3, at least 2^-9, 1 of zeros; codes of w / (scale * scale_2), ties to even.
/// scheme: e2m1 in groups of 16 with e4m3 scales under one f32 a matrix. Throws Error{"not-finite"}.
/// largest: of all that shares its scale of the whole tensor; 0: nothing else does.
QuantizedTensor encode_nvfp4(const Scheme& scheme, const Shape& shape, WeightView weight, float largest = 0);

/// MXFP4 as triton_kernels rounds it (downcast_to_mxfp, rounding scales up): the least power of two that brings a
/// group's largest magnitude to 6 or less, 2^-127 of zeros; ties to even; -0 stays -0.
/// scheme: e2m1 with e8m0 scales of 32 elements along the last axis but one, of which there are a multiple of 32.
/// Throws Error{"not-finite"}.
QuantizedTensor encode_mxfp4_columns(const Scheme& scheme, const Shape& shape, WeightView weight);

}  // namespace bitwright
