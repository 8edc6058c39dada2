#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/imatrix.hpp"
#include "evaluate/evaluate.hpp"
#include "model/gguf_export.hpp"

namespace bitwright {

/// What a model's matrices were given while it read a text.
struct Calibration {
  int64_t windows = 0, tokens = 0;
  std::map<MatrixName, InputSquares> inputs{};  ///< of each matrix, what no token was sent to left out
};

/// Sums up the squares of what goes into each matrix of the layers, over full windows of `tokens`. The same bits for
/// every number of threads. Throws what evaluate does; Error{"not-finite"} names the matrix.
Calibration calibrate(const Model& model, const std::vector<int32_t>& tokens, const Protocol& protocol,
                      std::optional<int32_t> bos);

/// The same under GGUF's names, stacks whole. A matrix that no token was sent to has zeros.
Imatrix importance_of(const Calibration& calibration, const std::multimap<MatrixName, GgufMatrix>& names);

}  // namespace bitwright
