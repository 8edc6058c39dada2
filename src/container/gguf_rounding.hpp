#pragma once

#include <span>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// How ggml (d99724f, quantize_row_*_ref) rounds to the types whose rounding is no search: Q4_0, Q4_1, Q5_0, Q5_1,
/// Q8_0, MXFP4, NVFP4, TQ1_0, TQ2_0, bit for bit. Needs a scheme of one of them that fits the shape. Throws
/// Error{"not-finite"}; {"bad-scheme"} for the others.
QuantizedTensor round_to_gguf(const Scheme& scheme, const Shape& shape, WeightView weight);
/// With ggml's weights of errors: importance, one a column (an imatrix). Q4_0, Q4_1, Q5_0 and Q5_1 heed it.
QuantizedTensor round_to_gguf(const Scheme& scheme, const Shape& shape, WeightView weight,
                              std::span<const float> importance);

}  // namespace bitwright
