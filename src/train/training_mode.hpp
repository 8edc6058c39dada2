#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"
#include "bitwright/torch/finetuning.hpp"
#include "bitwright/torch/training_config.hpp"
#include "train/causal_lm.hpp"

namespace bitwright::train {

/// What a mode did to the model before it learns.
struct Prepared {
  std::shared_ptr<QuantizedFinetuning> finetuning{};
  OrderedJson quantization{};  ///< for quantization_metadata.json of checkpoints; null: nothing is quantized
};
/// The model after training, as a mode ends it.
struct Ending {
  CausalLm& model;
  const TrainingConfig& config;
  std::function<void()> calibrate;  ///< runs the model over some of the training text
  std::function<double()> loss;     ///< on the text for validation
  std::filesystem::path adapter;    ///< where adapters go
  OrderedJson& result;              ///< of the command
  std::vector<Warning>& warnings;
};

/// One way to train: a row of a table. What it needs of the model's weights, before and after.
struct TrainingMode {
  std::string_view name;
  bool (*wanted)(const TrainingConfig& config);
  bool frozen = false;  ///< most of the model does not learn, and must be the same when training goes on
  /// How a checkpoint is read; null: all of it becomes floats.
  void (*load)(const TrainingConfig& config, CausalLmOptions& options) = nullptr;
  Prepared (*prepare)(CausalLm& model, const TrainingConfig& config, std::vector<Warning>& warnings) = nullptr;
  /// False: there is no model of its own to export.
  bool (*finish)(const Ending& ending) = nullptr;
};
/// The first that is wanted; the last one, plain training, always is.
const TrainingMode& training_mode(const TrainingConfig& config);

}  // namespace bitwright::train
