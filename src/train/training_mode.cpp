#include "train/training_mode.hpp"

#include "recipe/config.hpp"

namespace bitwright::train {
namespace {

bool always(const TrainingConfig&) { return true; }

const TrainingMode kModes[] = {
    {.name = "plain", .wanted = always},
};

}  // namespace

const TrainingMode& training_mode(const TrainingConfig& config) {
  for (const TrainingMode& mode : kModes)
    if (mode.wanted(config)) return mode;
  return kModes[std::size(kModes) - 1];
}

}  // namespace bitwright::train
