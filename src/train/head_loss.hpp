#pragma once

#include <functional>

#include "train/dense.hpp"

namespace bitwright::train {

/// The loss of a language model over the rows of its last layer, whose target is not kIgnored (ops.hpp).
struct HeadLoss {
  Matrix hidden;  ///< [rows, inputs]
  Matrix head;    ///< [words, inputs], of the same type
  /// Where the head is not kept in that type: writes some of its words to `out`, and head.data is null. The head learns
  /// nothing then. Called from several threads.
  std::function<void(int64_t first, int64_t count, void* out)> words{};
  const int64_t* targets;
  float cap;  ///< of the logits; 0: none

  // The gradients of what compute() returns, written; null: they are not wanted (that of the head alone, or both).
  float* dhidden = nullptr;
  float* dhead = nullptr;

  /// The mean of -log softmax(logits)[target]. Logits of some rows and words at a time, in float32; what becomes of
  /// them is kept, and multiplied with, in the type of `hidden`.
  double compute() const;
};

}  // namespace bitwright::train
