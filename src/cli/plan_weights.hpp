#pragma once

#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"
#include "engine/lint.hpp"
#include "engine/model_summary.hpp"
#include "engine/plan.hpp"

namespace bitwright {

/// What a plan calls the model that is still to be made.
inline constexpr const char* kOutput = "OUT";

/// What becomes of a model's weights.
struct WeightsPlan {
  OrderedJson scheme, algorithm, container;  ///< text, or null: they stay as they are
  OrderedJson tensors = OrderedJson::array();
  std::string command{};  ///< that makes them so, to kOutput; empty: nothing is to be made, or not by this program
  double file_bytes = 0;  ///< of the weight files that the engine gets: as `quantize` writes them, or as they are
  std::vector<LinearModule> modules{};  ///< the linear layers as they will be stored
  std::string checkpoint{};             ///< what engines call weights that are stored so; empty: nothing is to be made
  double loaded_bytes = 0;              ///< in the engine's memory, if it changes nothing while loading
};

/// path: of the model, as it was given. config: the `quantization` block and what stands around it, as one engine sees
/// it. format: the container asked for, empty: the one that the engine loads. Adds a warning where weights cannot be
/// made so by this program.
WeightsPlan plan_weights(const std::string& path, const ModelSummary& model, const OrderedJson& config,
                         const PlanRequest& request, const EnginePlan& plan, const std::string& format,
                         std::vector<Warning>& warnings);

}  // namespace bitwright
