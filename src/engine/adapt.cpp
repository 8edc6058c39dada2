#include "engine/adapt.hpp"

#include <algorithm>
#include <array>

namespace bitwright {
namespace {

/// What may stand for a value, the nearest first: the same bytes, then a little more, at last what the engine chooses.
struct Nearest {
  std::string_view field, value;
  std::vector<std::string> instead;
};
const std::vector<Nearest>& nearest() {
  static const std::vector<Nearest> table = {
      {"gemm_dtype", "fp8", {"bfloat16", "float16", "auto"}},
      {"gemm_dtype", "int8", {"fp8", "bfloat16", "float16", "auto"}},
      {"gemm_dtype", "bfloat16", {"float16", "auto"}},
      {"gemm_dtype", "float16", {"bfloat16", "auto"}},
      {"gemm_dtype", "float32", {"bfloat16", "float16", "auto"}},
      {"kvcache_dtype", "fp8", {"int8", "bfloat16", "auto"}},
      {"kvcache_dtype", "fp8_e4m3", {"int8", "bfloat16", "auto"}},
      {"kvcache_dtype", "fp8_e5m2", {"fp8_e4m3", "int8", "bfloat16", "auto"}},
      {"kvcache_dtype", "int8", {"fp8_e4m3", "bfloat16", "auto"}},
      {"kvcache_dtype", "int4", {"int8", "fp8_e4m3", "bfloat16", "auto"}},
      {"kvcache_dtype", "fp16", {"bfloat16", "auto"}},
      {"kvcache_dtype", "bfloat16", {"fp16", "auto"}},
      {"moe_dtype", "w4afp8", {"mxfp4", "fp8", "int8", "auto"}},
      {"moe_dtype", "mxfp4", {"w4afp8", "fp8", "int8", "auto"}},
      {"moe_dtype", "fp8", {"int8", "auto"}},
      {"moe_dtype", "int8", {"fp8", "auto"}},
      {"intent", "int8", {"fp8", "none"}},
      {"intent", "fp8", {"int8", "none"}},
      {"intent", "int4", {"nf4", "fp4", "fp8", "int8", "none"}},
      {"intent", "nf4", {"int4", "fp4", "fp8", "none"}},
      {"intent", "fp4", {"nvfp4", "mxfp4", "int4", "fp8", "none"}},
      {"intent", "nvfp4", {"fp4", "mxfp4", "int4", "fp8", "none"}},
      {"intent", "mxfp4", {"fp4", "nvfp4", "int4", "fp8", "none"}},
      {"intent", "int3", {"int4", "fp4", "fp8", "none"}},
      {"intent", "int2", {"int3", "int4", "fp8", "none"}},
  };
  return table;
}

/// One thing that may give way: its values from what was asked to what is farthest.
struct Dimension {
  std::string field;
  std::vector<std::string> values;
};

std::vector<std::string> values_of(std::string_view field, const std::string& asked) {
  std::vector<std::string> values = {asked};
  const auto row =
      std::ranges::find_if(nearest(), [&](const Nearest& n) { return n.field == field && n.value == asked; });
  if (row != nearest().end())
    values.insert(values.end(), row->instead.begin(), row->instead.end());
  else
    values.emplace_back("auto");
  return values;
}

std::vector<Dimension> dimensions_of(const PlanRequest& request) {
  std::vector<Dimension> dimensions;
  for (const auto& [field, value] : request.fields)
    if (value != "auto") dimensions.push_back({field, values_of(field, value)});
  const std::string& method = request.intent.method;
  if (method == "none" || method == "auto" || !request.intent.backend_method.empty()) return dimensions;
  if (request.intent.weight_only) {
    const bool given = *request.intent.weight_only;
    dimensions.push_back({"weight_only", {given ? "true" : "false", given ? "false" : "true"}});
  }
  dimensions.push_back({"intent", values_of("intent", method)});
  return dimensions;
}

PlanRequest changed(const PlanRequest& request, const std::vector<Dimension>& dimensions, const std::vector<size_t>& at,
                    std::vector<Change>& changes) {
  PlanRequest other = request;
  for (size_t i = 0; i < dimensions.size(); ++i) {
    if (at[i] == 0) continue;
    const auto& [field, values] = dimensions[i];
    const std::string& value = values[at[i]];
    changes.push_back({field, values[0], value});
    if (field == "intent")
      other.intent.method = value;
    else if (field == "weight_only")
      other.intent.weight_only = value == "true";
    else
      other.fields[field] = value;
  }
  return other;
}

/// Calls `visit` for every choice of steps that add up to `total`, the last dimension giving way first; stops when it
/// returns true.
template <class Visit>
bool each_at(const std::vector<Dimension>& dimensions, size_t i, size_t total, std::vector<size_t>& at, Visit visit) {
  if (i == dimensions.size()) return total == 0 && visit();
  for (size_t step = 0; step <= total && step < dimensions[i].values.size(); ++step) {
    at[i] = step;
    if (each_at(dimensions, i + 1, total - step, at, visit)) return true;
  }
  at[i] = 0;
  return false;
}

}  // namespace

std::optional<AdaptedPlan> adapt_plan(const PlanRequest& request, const Facts& facts) {
  const std::vector<Dimension> dimensions = dimensions_of(request);
  size_t farthest = 0;
  for (const Dimension& dimension : dimensions) farthest += dimension.values.size() - 1;
  std::optional<AdaptedPlan> found;
  std::vector<size_t> at(dimensions.size());
  for (size_t distance = 0; distance <= farthest && !found; ++distance)
    each_at(dimensions, 0, distance, at, [&] {
      std::vector<Change> changes;
      PlanRequest other = changed(request, dimensions, at, changes);
      EnginePlan plan = plan_engine(other, facts);
      if (plan.outcome == "error") return false;
      found = AdaptedPlan{std::move(other), std::move(plan), std::move(changes)};
      return true;
    });
  return found;
}

}  // namespace bitwright
