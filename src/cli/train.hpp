#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"

namespace bitwright {

/// What `train` was asked for.
struct TrainingRequest {
  std::filesystem::path config;
  std::vector<std::string> set{};  ///< KEY=VALUE
  bool resume = false, force = false;
};
/// Returns the command's result.
using TrainingRun = OrderedJson (*)(const TrainingRequest& request, std::vector<Warning>& warnings);

/// libtorch takes half a second to load: only bitwright-train has it, a program that parses the same command line.
/// Without a TrainingRun `train` becomes that program.
void set_training(TrainingRun run);

/// bitwright-train, if it lies beside this program.
std::optional<std::filesystem::path> training_program();

}  // namespace bitwright
