#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine/plan.hpp"

namespace bitwright {

/// One thing that --adapt asked for instead of what the user did.
struct Change {
  std::string field, from, to;
};
struct AdaptedPlan {
  PlanRequest request;
  EnginePlan plan;
  std::vector<Change> changes;
};

/// The plan nearest to what was asked that the engine and the device accept: fields and intent give way, each to what
/// is nearest to it first; the user's parameters, the checkpoint and the device never do. No changes if the request
/// works as it is; none at all if nothing does.
std::optional<AdaptedPlan> adapt_plan(const PlanRequest& request, const Facts& facts = Facts::standard());

}  // namespace bitwright
