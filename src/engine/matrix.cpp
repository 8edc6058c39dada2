#include "engine/matrix.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "engine/condition.hpp"

namespace bitwright {
namespace {

/// What decides: the gravest diagnostic that is not a note, and what is set beside it.
std::string cell(const EnginePlan& plan) {
  std::string set;
  const auto add = [&](const std::string& text) { set += (set.empty() ? "`" : " `") + text + "`"; };
  for (const Argument& argument : plan.args)
    add(argument.value == true ? argument.flag : argument.flag + " " + value_text(argument.value));
  for (const Json* tree : {&plan.config_file, &plan.api})
    if (!tree->empty()) add(tree->dump());
  const auto worst = std::ranges::max_element(plan.diagnostics, {}, &Diagnostic::severity);
  const bool grave = worst != plan.diagnostics.end() && worst->severity != Severity::note;
  if (grave && worst->severity == Severity::error) return "**" + worst->code + "**";
  const std::string said = grave ? worst->code : "";
  if (set.empty()) return said.empty() ? "default" : said;
  return said.empty() ? set : set + " " + said;
}

}  // namespace

std::string precision_matrix(std::string_view hardware, const Facts& facts) {
  const auto engines = facts.all("engines");
  std::string table = "| field | value |", line = "|---|---|";
  for (const Json* engine : engines) {
    table += fmt::format(" {} |", (*engine)["name"].get<std::string>());
    line += "---|";
  }
  table += "\n" + line + "\n";
  for (const std::string& field : field_names())
    for (const std::string& value : field_values(field)) {
      if (value == "auto") continue;
      table += fmt::format("| {} | {} |", field, value);
      for (const Json* engine : engines) {
        PlanRequest request{.engine = (*engine)["name"].get<std::string>()};
        request.hardware = facts.get("hardware", hardware);
        request.model = {{"moe", true}};
        request.fields = {{field, value}};
        table += fmt::format(" {} |", cell(plan_engine(request, facts)));
      }
      table += "\n";
    }
  return table;
}

}  // namespace bitwright
