#include "engine/matrix.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <set>

#include "engine/condition.hpp"
#include "engine/container_tables.hpp"
#include "engine/describe.hpp"
#include "engine/precision.hpp"

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
  std::string said = grave ? worst->code : "";
  if (set.empty() && said.empty())
    return plan.answers.empty() || plan.answers.back().outcome == "default" ? "default" : plan.answers.back().why;
  if (set.empty()) return said;
  return said.empty() ? set : set + " " + said;
}

/// The first columns' titles, then one column for each engine.
std::string engine_header(std::initializer_list<std::string_view> titles, const Facts& facts) {
  std::string table = "|", line = "|";
  const auto add = [&](std::string_view title) {
    table += fmt::format(" {} |", title);
    line += "---|";
  };
  for (const std::string_view title : titles) add(title);
  for (const Json* engine : facts.all("engines")) add((*engine)["name"].get<std::string>());
  return table + "\n" + line + "\n";
}

/// A row: what `cell` says of each engine.
std::string engine_row(std::initializer_list<std::string_view> titles, const Facts& facts,
                       const std::function<std::string(const std::string&)>& cell_of) {
  std::string row = "|";
  for (const std::string_view title : titles) row += fmt::format(" {} |", title);
  for (const Json* engine : facts.all("engines")) row += fmt::format(" {} |", cell_of((*engine)["name"]));
  return row + "\n";
}

std::string fields_table(const Facts& facts) { return precision_matrix("h100", facts); }

/// What becomes of an intent where the checkpoint has 16 bits.
std::string methods_table(const Facts& facts) {
  std::string table = engine_header({"method"}, facts);
  for (const std::string& method : intent_methods()) {
    if (method == "none" || method == "auto") continue;
    table += engine_row({method}, facts, [&](const std::string& engine) {
      PlanRequest request{.engine = engine, .hardware = facts.get("hardware", "h100"), .model = {{"moe", false}}};
      request.intent.method = method;
      return cell(plan_engine(request, facts));
    });
  }
  return table;
}

/// Which engine loads what; a number is the least compute capability among NVIDIA devices, a code what is to be known.
std::string checkpoints_table(const Facts& facts) {
  static constexpr std::array<std::string_view, 14> kFormats = {
      "awq", "gptq",  "compressed-tensors", "fp8",     "mxfp4",  "modelopt", "modelopt_fp4",
      "hqq", "quark", "bitsandbytes",       "torchao", "quanto", "mlx",      "gguf"};
  std::string table = engine_header({"checkpoint"}, facts);
  const auto cell_of = [&](const std::string& engine, std::string_view format) -> std::string {
    const Takes takes = takes_checkpoint(engine, format, facts);
    if (!takes.taken) return "";
    std::string text = takes.min_sm == 0 ? "yes" : capability_text(takes.min_sm) + "+";
    return takes.code.empty() ? text : text + " " + takes.code;
  };
  for (const std::string_view format : kFormats)
    table += engine_row({format}, facts, [&](const std::string& engine) { return cell_of(engine, format); });
  return table + engine_row({"bitwright (native)"}, facts,
                            [&](const std::string& engine) { return cell_of(engine, "bitwright"); });
}

/// The KV caches of each engine, with the bytes of an element (and of the scale that a token's head has).
std::string kv_cache_table(const Facts& facts) {
  std::string table = "| engine | type of the KV cache: bytes of an element |\n|---|---|\n";
  for (const Json* engine : facts.all("engines")) {
    if (!engine->contains("memory")) continue;
    std::string types;
    for (const auto& [type, bytes] : (*engine)["memory"]["kv_bytes"].items())
      types += fmt::format("{}`{}` {}{}", types.empty() ? "" : ", ", type, bytes[0].get<double>(),
                           bytes[1].get<double>() > 0 ? fmt::format(" + {} for a head", bytes[1].get<double>()) : "");
    table += fmt::format("| {} | {} |\n", (*engine)["name"].get<std::string>(), types);
  }
  return table;
}

std::string presets_table(const Facts& facts) {
  std::string table = "| preset |", line = "|---|";
  for (const std::string& field : field_names()) {
    table += fmt::format(" {} |", field);
    line += "---|";
  }
  table += "\n" + line + "\n";
  for (const Json* preset : facts.all("presets")) {
    table += fmt::format("| `{}` |", (*preset)["name"].get<std::string>());
    for (const std::string& field : field_names()) table += fmt::format(" {} |", preset->value(field, "auto"));
    table += "\n";
  }
  return table;
}

/// Which engines run a request on `device`: by name; in brackets where it is emulated or otherwise with reserve.
std::string engines_that_run(const Json& device, const PrecisionFields& fields, const Facts& facts) {
  std::string names;
  for (const Json* engine : facts.all("engines")) {
    PlanRequest request{.engine = (*engine)["name"], .hardware = device, .model = {{"moe", true}}};
    request.fields = fields;
    const EnginePlan plan = plan_engine(request, facts);
    const bool set = !plan.args.empty() || !plan.config_file.empty() || !plan.api.empty();
    if (plan.outcome == "error" || !set) continue;
    const bool fallback = std::ranges::any_of(plan.diagnostics, [](const Diagnostic& d) {
      return d.code == "HW_FALLBACK" || d.code == "BACKEND_SWITCH" || d.code == "NOT_OPTIMIZED";
    });
    names += (names.empty() ? "" : ", ") + (fallback ? "(" + plan.engine + ")" : plan.engine);
  }
  return names;
}

/// What runs on which kind of NVIDIA device: a row for each compute capability, with the devices that have it.
std::string devices_table(const Facts& facts) {
  struct Column {
    std::string_view title;
    PrecisionFields fields;
  };
  static const std::array<Column, 5> kColumns = {{{"bfloat16", {{"gemm_dtype", "bfloat16"}}},
                                                  {"fp8 weights at load", {{"gemm_dtype", "fp8"}}},
                                                  {"fp8_e4m3 KV", {{"kvcache_dtype", "fp8_e4m3"}}},
                                                  {"fp8_e5m2 KV", {{"kvcache_dtype", "fp8_e5m2"}}},
                                                  {"mxfp4 experts at load", {{"moe_dtype", "mxfp4"}}}}};
  std::map<int, std::pair<const Json*, std::string>> kinds;  // by capability: one device, and the names of all
  for (const Json* device : facts.all("hardware")) {
    if (!device->contains("sm")) continue;
    auto& [first, names] = kinds[(*device)["sm"].get<int>()];
    if (first == nullptr) first = device;
    names += (names.empty() ? "" : ", ") + (*device)["name"].get<std::string>();
  }
  std::string table = "| compute capability | devices |", line = "|---|---|";
  for (const Column& column : kColumns) {
    table += fmt::format(" {} |", column.title);
    line += "---|";
  }
  table += "\n" + line + "\n";
  for (const auto& [sm, kind] : kinds) {
    table += fmt::format("| {} | {} |", capability_text(sm), kind.second);
    for (const Column& column : kColumns)
      table += fmt::format(" {} |", engines_that_run(*kind.first, column.fields, facts));
    table += "\n";
  }
  return table;
}

}  // namespace

std::string precision_matrix(std::string_view hardware, const Facts& facts) {
  std::string table = engine_header({"field", "value"}, facts);
  for (const std::string& field : field_names())
    for (const std::string& value : field_values(field)) {
      if (value == "auto") continue;
      table += engine_row({field, value}, facts, [&](const std::string& engine) {
        PlanRequest request{.engine = engine};
        request.hardware = facts.get("hardware", hardware);
        request.model = {{"moe", true}};
        request.fields = {{field, value}};
        return cell(plan_engine(request, facts));
      });
    }
  return table;
}

std::span<const FactsTable> facts_tables() {
  static constexpr std::array kTables = {
      FactsTable{"fields", fields_table},           FactsTable{"methods", methods_table},
      FactsTable{"checkpoints", checkpoints_table}, FactsTable{"kv-cache", kv_cache_table},
      FactsTable{"presets", presets_table},         FactsTable{"devices", devices_table},
      FactsTable{"containers", containers_table},   FactsTable{"container-sections", containers_sections}};
  return kTables;
}

}  // namespace bitwright
