#pragma once

#include "bitwright/torch/trainer.hpp"

namespace bitwright::train {

/// Mean cross-entropy of the tokens that follow, in nats. inputs, targets: [batch, length] int64.
torch::Tensor loss_of(const TrainableModel& model, const torch::Tensor& inputs, const torch::Tensor& targets);

struct LossWindows {
  int64_t length;     ///< inputs of a window
  int64_t most = 0;   ///< windows; 0: all
  int64_t batch = 8;  ///< windows at a time
};
/// The same over windows of a text that do not overlap, in evaluation mode and float32; afterwards the model is in
/// training mode. Throws Error{"text-too-short"}.
double mean_loss(const TrainableModel& model, std::span<const int32_t> tokens, const LossWindows& windows);

}  // namespace bitwright::train
