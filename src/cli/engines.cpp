#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "cli/command.hpp"
#include "cli/page.hpp"
#include "engine/condition.hpp"
#include "engine/describe.hpp"
#include "engine/matrix.hpp"

namespace bitwright {
namespace {

OrderedJson run(const Arguments& arguments, std::vector<Warning>&) {
  if (arguments.flag("--matrix")) return {{"matrix", precision_matrix()}};
  if (const auto wanted = arguments.text("--table"))
    for (const FactsTable& table : facts_tables())
      if (table.name == *wanted) return {{"matrix", table.markdown(Facts::standard())}};
  if (!arguments.chosen.empty()) return {{"engine", describe_engine(arguments.chosen)}};
  OrderedJson engines = OrderedJson::array();
  for (const Json* engine : Facts::standard().all("engines")) {
    OrderedJson described = describe_engine((*engine)["name"].get<std::string>());
    OrderedJson one = OrderedJson::object();
    for (const char* member : {"name", "aliases", "version", "summary", "entry", "fields", "source"})
      if (described.contains(member)) one[member] = described[member];
    OrderedJson& methods = one["methods"] = OrderedJson::array();
    for (const OrderedJson& method : described["methods"]) methods.push_back(method["method"]);
    OrderedJson& formats = one["checkpoints"] = OrderedJson::array();
    for (const OrderedJson& checkpoint : described["checkpoints"]) formats.push_back(checkpoint["format"]);
    engines.push_back(std::move(one));
  }
  return {{"engines", engines}};
}

std::string text_of(const OrderedJson& object, const char* name) {
  const auto found = object.find(name);
  return found == object.end() ? std::string() : value_text(Json::parse(found->dump()));
}

/// "auto | fp8 | ...", the default marked.
std::string values_of(const OrderedJson& flag) {
  std::vector<std::string> values;
  if (flag.contains("values"))
    for (const OrderedJson& value : flag["values"]) values.push_back(value_text(Json::parse(value.dump())));
  else if (flag.contains("type"))
    values.push_back("<" + flag["type"].get<std::string>() + ">");
  std::string text = fmt::format("{}", fmt::join(values, " | "));
  if (flag.contains("default"))
    text += fmt::format("{}(default {})", text.empty() ? "" : "  ",
                        flag["default"].is_null() ? "none" : text_of(flag, "default"));
  if (flag.contains("since")) text += "  from " + text_of(flag, "since") + " on";
  if (const std::string place = text_of(flag, "place"); !place.empty() && place != "cli") text += "  in the " + place;
  return text;
}

/// What limits a method or a checkpoint on devices: "8.9+", "up to 9.0", "natively 10.0+", "amd only".
std::string limits_of(const OrderedJson& row) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (row.contains("min_sm")) add(capability_text(row["min_sm"].get<int>()) + "+");
  if (row.contains("max_sm")) add("up to " + capability_text(row["max_sm"].get<int>()));
  if (row.contains("native_sm")) add("natively " + capability_text(row["native_sm"].get<int>()) + "+");
  if (row.contains("vendors"))
    add(fmt::format("{} only", fmt::join(row["vendors"].get<std::vector<std::string>>(), ", ")));
  if (row.value("experts_only", false)) add("experts only");
  if (row.contains("is")) add("as " + text_of(row, "is"));
  if (row.contains("warning")) add(text_of(row, "warning"));
  return text;
}

/// "gptq (8.0+), awq": the names of a list with what limits each.
std::string names_with_limits(const OrderedJson& rows, const char* name) {
  std::string text;
  for (const OrderedJson& row : rows) {
    const std::string limits = limits_of(row);
    text += (text.empty() ? "" : ", ") + text_of(row, name) + (limits.empty() ? "" : " (" + limits + ")");
  }
  return text;
}

void print_list(const char* title, const std::string& text) {
  constexpr size_t kIndent = 13;
  if (!text.empty()) fmt::print("{:<12} {}\n", title, wrapped(text, kIndent));
}

void print_engine(const OrderedJson& e) {
  fmt::print("{} {}: {}\n", text_of(e, "name"), text_of(e, "version"), text_of(e, "summary"));
  const OrderedJson& source = e["source"];
  print_list("facts from", text_of(source, "repo") + " " + text_of(source, "commit").substr(0, 10) + " " +
                               text_of(source, "date") + " " + text_of(source, "version"));
  if (e.contains("aliases"))
    print_list("also called", fmt::format("{}", fmt::join(e["aliases"].get<std::vector<std::string>>(), ", ")));
  std::vector<std::string> entries;
  for (const auto& [name, pattern] : e["entries"].items()) entries.push_back(pattern.get<std::string>());
  print_list("run as", fmt::format("{}", fmt::join(entries, "; ")));

  std::vector<std::vector<std::string>> flags;
  for (const OrderedJson& flag : e["flags"]) flags.push_back({text_of(flag, "flag"), values_of(flag)});
  if (!flags.empty()) fmt::print("\nflags about precision\n{}", columns(flags, 2));
  for (const OrderedJson& flag : e["removed_flags"])
    fmt::print("  not any more: {}, {}\n", text_of(flag, "flag"), text_of(flag, "say"));

  OrderedJson at_load = OrderedJson::array();
  for (const OrderedJson& method : e["methods"])
    if (std::ranges::find(method["mode"], OrderedJson("online")) != method["mode"].end()) at_load.push_back(method);
  fmt::print("\n");
  print_list("at load", names_with_limits(at_load, "method"));
  print_list("checkpoints", names_with_limits(e["checkpoints"], "format"));
  std::string cache;
  for (const OrderedJson& type : e["kv_cache"])
    cache += fmt::format("{}{} {}", cache.empty() ? "" : ", ", text_of(type, "type"), type["bytes"].get<double>());
  print_list("KV cache", cache.empty() ? cache : cache + " (bytes of an element)");

  std::vector<std::vector<std::string>> conflicts;
  for (const OrderedJson& c : e["conflicts"])
    conflicts.push_back({text_of(c, "severity"), text_of(c, "code"), text_of(c, "say")});
  if (!conflicts.empty()) fmt::print("\nknown conflicts\n{}", columns(conflicts, 2));
}

void print(const OrderedJson& result) {
  if (result.contains("matrix")) return fmt::print("{}", result["matrix"].get<std::string>());
  if (result.contains("engine")) return print_engine(result["engine"]);
  for (const OrderedJson& e : result["engines"])
    fmt::print("{:<14} {:<14} {}\n", text_of(e, "name"), text_of(e, "version"), text_of(e, "summary"));
}

std::vector<Option> options() {
  Option table{.name = "--table",
               .type = Option::Type::text,
               .value_name = "NAME",
               .help = "one of the documentation's Markdown tables"};
  for (const FactsTable& row : facts_tables()) table.values.emplace_back(row.name);
  table.help += fmt::format(": {}", fmt::join(table.values, ", "));
  return {{.name = "--matrix",
           .type = Option::Type::flag,
           .value_name = "",
           .help = "Markdown table: each precision field on each engine"},
          std::move(table)};
}

}  // namespace

extern const Command engines_command;
const Command engines_command = {.name = "engines",
                                 .summary = "engines that plans are made for",
                                 .takes_model = false,
                                 .takes_name = "one engine: its flags, checkpoints, KV types and conflicts",
                                 .options = options(),
                                 .run = run,
                                 .print = print};

}  // namespace bitwright
