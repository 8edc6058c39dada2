#pragma once

#include <memory>
#include <optional>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// How the inputs or outputs of a layer, or the KV cache, are quantized while the model runs.
struct ActivationScheme {
  Scheme scheme{};
  bool dynamic = true;  ///< scales come from the values at run time; otherwise they are those that were calibrated:
  std::shared_ptr<const QuantizedTensor> scale{}, offset{};  ///< as stored; null where there is none
};

/// What belongs to a linear layer and not to its weight. A container that reads it writes it again, bit for bit.
struct QuantizedLinear {
  std::optional<ActivationScheme> input{}, output{};
  /// LLM.int8: columns of the input with a larger magnitude are multiplied in floats. 0: none.
  float outlier_threshold = 0;
};

}  // namespace bitwright
