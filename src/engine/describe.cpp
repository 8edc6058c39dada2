#include "engine/describe.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "engine/condition.hpp"
#include "engine/loads.hpp"
#include "engine/plan.hpp"

namespace bitwright {
namespace {

/// The compute capabilities of the devices that are known, least first.
std::set<int> capabilities(const Facts& facts) {
  std::set<int> found;
  for (const Json* device : facts.all("hardware"))
    if (device->contains("sm")) found.insert((*device)["sm"].get<int>());
  return found;
}

/// The gravest of what a plan for such a checkpoint says, but for notes.
std::optional<Diagnostic> worst_of(std::string_view engine, std::string_view method, const Json& hardware,
                                   const Facts& facts, const Json& model) {
  const EnginePlan plan = plan_engine(
      {.engine = std::string(engine), .hardware = hardware, .checkpoint = std::string(method), .model = model}, facts);
  const auto worst = std::ranges::max_element(plan.diagnostics, {}, &Diagnostic::severity);
  if (worst == plan.diagnostics.end() || worst->severity == Severity::note) return std::nullopt;
  return *worst;
}

/// Every checkpoint format that some engine's facts name.
std::set<std::string> checkpoint_formats(const Facts& facts) {
  std::set<std::string> formats;
  for (const Json* engine : facts.all("engines"))
    for (const Json& row : (*engine)["checkpoints"]) {
      const auto named = row["when"].find("ckpt");
      if (named == row["when"].end()) continue;
      for (const Json& name : named->is_array() ? *named : Json::array({*named})) formats.insert(value_text(name));
    }
  return formats;
}

OrderedJson checkpoints_of(const Json& engine, const Facts& facts) {
  const auto name = engine["name"].get<std::string>();
  OrderedJson list = OrderedJson::array();
  for (const std::string& format : checkpoint_formats(facts)) {
    const Takes takes = takes_checkpoint(name, format, facts);
    if (!takes.taken) continue;
    list.push_back({{"format", format}});
    if (takes.min_sm != 0) list.back()["min_sm"] = takes.min_sm;
    if (!takes.code.empty()) list.back()["warning"] = takes.code;
  }
  return list;
}

OrderedJson fields_of(const Json& engine) {
  OrderedJson fields = OrderedJson::object();
  for (const auto& [field, values] : engine["map"].items()) {
    fields[field] = OrderedJson::array();
    for (const auto& [value, candidates] : values.items()) fields[field].push_back(value);
  }
  return fields;
}

/// `members` of a document, in this order, those that it has.
OrderedJson picked(const Json& document, std::initializer_list<const char*> members) {
  OrderedJson result = OrderedJson::object();
  for (const char* member : members)
    if (const auto found = document.find(member); found != document.end()) result[member] = OrderedJson(*found);
  return result;
}

}  // namespace

std::string capability_text(int sm) { return fmt::format("{:.1f}", sm / 10.0); }

Takes takes_checkpoint(std::string_view engine, std::string_view method, const Facts& facts) {
  return takes_checkpoint(engine, method, facts, Json::object());
}

Takes takes_checkpoint(std::string_view engine, std::string_view method, const Facts& facts, const Json& model) {
  Takes takes;
  const auto anywhere = worst_of(engine, method, Json::object(), facts, model);
  if (anywhere) takes.code = anywhere->code;
  if (anywhere && refuses(*anywhere)) return takes;
  takes.taken = true;
  bool all = true;
  for (const int sm : capabilities(facts)) {
    const auto here = worst_of(engine, method, {{"vendor", "nvidia"}, {"sm", sm}}, facts, model);
    if (here && here->severity == Severity::error) {
      all = false;
    } else {
      if (!all) takes.min_sm = sm;
      return takes;
    }
  }
  return takes;  // no NVIDIA device; others may
}

OrderedJson describe_engine(std::string_view name, const Facts& facts) {
  const Json& engine = facts.get("engines", name);
  OrderedJson result = picked(engine, {"name", "aliases", "version", "summary", "source", "entry", "entries"});
  result["fields"] = fields_of(engine);
  OrderedJson& flags = result["flags"] = OrderedJson::array();
  for (const Json& row : engine["flags"])
    flags.push_back(picked(
        row, {"flag", "aliases", "type", "default", "values", "since", "place", "entries", "refused", "help", "file"}));
  OrderedJson& removed = result["removed_flags"] = OrderedJson::array();
  if (const auto rows = engine.find("removed_flags"); rows != engine.end())
    for (const auto& [flag, row] : rows->items()) {
      removed.push_back({{"flag", flag}});
      removed.back().update(picked(row, {"since", "say"}));
    }
  OrderedJson& methods = result["methods"] = OrderedJson::array();
  for (const auto& [method, row] : engine["methods"].items()) {
    methods.push_back({{"method", method}});
    methods.back().update(
        picked(row, {"mode", "min_sm", "max_sm", "native_sm", "vendors", "experts_only", "is", "format", "file"}));
  }
  result["checkpoints"] = checkpoints_of(engine, facts);
  OrderedJson& cache = result["kv_cache"] = OrderedJson::array();
  if (const auto memory = engine.find("memory"); memory != engine.end())
    for (const auto& [type, bytes] : (*memory)["kv_bytes"].items())
      cache.push_back({{"type", type}, {"bytes", OrderedJson(bytes[0])}, {"scale_bytes", OrderedJson(bytes[1])}});
  OrderedJson& conflicts = result["conflicts"] = OrderedJson::array();
  for (const Json& rule : engine["checks"]) {
    conflicts.push_back({{"code", rule["code"].get<std::string>()}, {"severity", rule.value("severity", "error")}});
    conflicts.back().update(picked(rule, {"say", "instead", "when"}));
  }
  return result;
}

}  // namespace bitwright
