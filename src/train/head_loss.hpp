#pragma once

#include "train/dense.hpp"

namespace bitwright::train {

/// The loss of a language model over the rows of its last layer, whose target is not kIgnored (ops.hpp).
struct HeadLoss {
  Matrix hidden;  ///< [rows, inputs]
  Matrix head;    ///< [words, inputs], of the same type
  const int64_t* targets;
  float cap;  ///< of the logits; 0: none

  // The gradients of what compute() returns, written; all of them or none.
  float* dhidden = nullptr;
  float* dhead = nullptr;

  /// The mean of -log softmax(logits)[target]. Logits of some rows and words at a time, in float32; what becomes of
  /// them is kept, and multiplied with, in the type of `hidden`.
  double compute() const;
};

}  // namespace bitwright::train
