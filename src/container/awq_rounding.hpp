#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Codes, scales and zero points as AutoAWQ's pseudo_quantize_tensor finds them and WQLinear packs them. The range of a
/// group need not hold 0: a group far from it, all of one value, is lost, as it is there.
/// arithmetic: f16, in which AutoAWQ runs models (each step is rounded), or f32.
/// scheme: uint4 with zero points, groups along rows that are no ragged ones, float16 scales.
/// Throws Error{"not-finite"} (also of weights that f16 cannot hold), Error{"scale-overflow"}.
QuantizedTensor encode_awq_in(DType arithmetic, const Scheme& scheme, const Shape& shape, WeightView weight);

/// In f16.
QuantizedTensor encode_awq(const Scheme& scheme, const Shape& shape, WeightView weight);

}  // namespace bitwright
