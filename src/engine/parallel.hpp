#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/lint.hpp"
#include "engine/memory.hpp"
#include "engine/plan.hpp"

namespace bitwright {

/// How devices share a model.
struct Parallelism {
  int64_t tensor = 1;    ///< devices that share every layer
  int64_t pipeline = 1;  ///< groups of devices that have some layers each
  int64_t expert = 1;    ///< devices that share a layer's experts, each expert whole on one of them
  int64_t devices() const { return tensor * pipeline; }
};
/// From the engine's own arguments, by its facts.
Parallelism parallelism_of(const EnginePlan& plan, const Facts& facts = Facts::standard());

/// What a deployment is made of.
struct Deployed {
  std::span<const LinearModule> modules{};
  double weight_bytes = 0;  ///< stored; 0: by the model's facts
  Deployment deployment{};  ///< its parallelism is not looked at
  int64_t devices = 0;      ///< there are; 0: not known, derived up to 64
};

/// What speaks against the parallelism that a plan has: heads, widths, experts and layers it does not divide
/// (PARALLEL_SPLIT), more devices than there are (TOO_FEW_DEVICES). Attention heads and groups that the checkpoint
/// declares are plan_engine's.
std::vector<Diagnostic> check_parallel(const PlanRequest& request, const EnginePlan& plan, int64_t devices,
                                       const Facts& facts = Facts::standard());

/// The request with every parameter "auto" among tensor_parallel, pipeline_parallel and expert_parallel, or the
/// engine's own flags for them, replaced: the fewest devices on which the deployment fits, tensor parallelism before
/// pipelines, experts whole where their weights could not be cut. Numbers under these neutral names become the engine's
/// flags; all else stays as given. `said`: DOES_NOT_FIT if nothing does. Throws Error (exit status 2) where the engine
/// has no such flag or the device's memory is not known.
PlanRequest derive_parallel(PlanRequest request, const Deployed& deployed, std::vector<Diagnostic>& said,
                            const Facts& facts = Facts::standard());

}  // namespace bitwright
