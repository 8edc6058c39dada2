#pragma once

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// The codes that GPTQ's quantizer finds without a Hessian, as AutoGPTQ and GPTQModel store them: the range of a group
/// always holds 0; a symmetric one is [-m, m], of m = its largest magnitude, and 2 m / (2^bits - 1) the scale; codes
/// are chosen with the scale in f32, then it is stored. A symmetric group without a negative value has half that scale,
/// and values over the middle are clipped: so do the libraries. scheme: of integers, symmetric or with zero points,
/// that fits the container, groups along rows. weight: of any floating type. Throws Error{"not-finite"},
/// Error{"scale-overflow"}.
QuantizedTensor encode_gptq(const Scheme& scheme, const Shape& shape, WeightView weight);

}  // namespace bitwright
