#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"

namespace bitwright::train {

struct TrainingRunOptions {
  std::filesystem::path config{};
  std::vector<std::string> set{};  ///< KEY=VALUE
  bool resume = false;             ///< from the newest checkpoint in the output directory, if there is one
  bool force = false;              ///< remove the run that is there
};

/// All that `bitwright train` does: model, tokens, Trainer, and the trained model as OUTPUT/model (adapters that are not
/// merged: OUTPUT/adapter). Returns what INTERFACES.md lists for `train`. Adds to `warnings`.
/// Throws Error{"output-exists"} where a run is there and neither resumed nor removed, and as its parts do.
OrderedJson run_training(const TrainingRunOptions& options, std::vector<Warning>& warnings);

}  // namespace bitwright::train
