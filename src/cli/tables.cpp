#include <fmt/format.h>
#include <fmt/ranges.h>

#include "algorithm/algorithm.hpp"
#include "cli/command.hpp"
#include "container/container.hpp"
#include "engine/loads.hpp"
#include "engine/matrix.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {
namespace {

OrderedJson run_formats(const Arguments&, std::vector<Warning>&) {
  OrderedJson formats = OrderedJson::array();
  for (const Container* c : all_containers()) {
    formats.push_back({{"name", c->name},
                       {"reads", true},
                       {"writes", c->write_metadata != nullptr},
                       {"summary", c->summary},
                       {"source", c->source},
                       {"engines", OrderedJson::array()}});
    for (const Loads& answer : engines_that_load(method_of(*c)))
      if (answer.yes) formats.back()["engines"].push_back(answer.engine);
  }
  return {{"formats", formats}};
}

void print_formats(const OrderedJson& result) {
  for (const OrderedJson& f : result["formats"]) {
    fmt::print("{:<16} {:<11} {}\n", f["name"].get<std::string>(), f["writes"].get<bool>() ? "read, write" : "read",
               f["summary"].get<std::string>());
    fmt::print("{:<16} {:<11} for {}\n", "", "", fmt::join(f["engines"].get<std::vector<std::string>>(), ", "));
  }
}

OrderedJson run_methods(const Arguments&, std::vector<Warning>&) {
  OrderedJson algorithms = OrderedJson::array(), elements = OrderedJson::array();
  for (const Algorithm* a : all_algorithms())
    algorithms.push_back({{"name", a->name}, {"summary", a->summary}, {"source", a->source}});
  for (const ElementType* e : all_elements())
    elements.push_back({{"name", e->name}, {"bits", e->bits}, {"source", e->source}});
  return {{"algorithms", algorithms}, {"elements", elements}};
}

void print_methods(const OrderedJson& result) {
  for (const OrderedJson& a : result["algorithms"])
    fmt::print("{:<16} {}\n", a["name"].get<std::string>(), a["summary"].get<std::string>());
  std::string names;
  for (const OrderedJson& e : result["elements"]) names += " " + e["name"].get<std::string>();
  fmt::print("\nelements:{}\n", names);
}

OrderedJson run_engines(const Arguments& arguments, std::vector<Warning>&) {
  if (arguments.flag("--matrix")) return {{"matrix", precision_matrix()}};
  OrderedJson engines = OrderedJson::array();
  for (const Json* engine : Facts::standard().all("engines")) {
    OrderedJson fields = OrderedJson::object();
    for (const auto& [field, values] : (*engine)["map"].items()) {
      fields[field] = OrderedJson::array();
      for (const auto& [value, candidates] : values.items()) fields[field].push_back(value);
    }
    engines.push_back({{"name", (*engine)["name"].get<std::string>()},
                       {"aliases", engine->value("aliases", std::vector<std::string>())},
                       {"version", (*engine)["version"].get<std::string>()},
                       {"summary", (*engine)["summary"].get<std::string>()},
                       {"entry", (*engine)["entry"].get<std::string>()},
                       {"fields", fields},
                       {"methods", OrderedJson::array()},
                       {"source", OrderedJson((*engine)["source"])}});
    for (const auto& [method, facts] : (*engine)["methods"].items()) engines.back()["methods"].push_back(method);
  }
  return {{"engines", engines}};
}

void print_engines(const OrderedJson& result) {
  if (result.contains("matrix")) {
    fmt::print("{}", result["matrix"].get<std::string>());
    return;
  }
  for (const OrderedJson& e : result["engines"])
    fmt::print("{:<14} {:<14} {}\n", e["name"].get<std::string>(), e["version"].get<std::string>(),
               e["summary"].get<std::string>());
}

OrderedJson run_hardware(const Arguments&, std::vector<Warning>&) {
  OrderedJson devices = OrderedJson::array();
  for (const Json* device : Facts::standard().all("hardware")) devices.push_back(OrderedJson(*device));
  return {{"hardware", devices}};
}

void print_hardware(const OrderedJson& result) {
  for (const OrderedJson& d : result["hardware"])
    fmt::print("{:<18} {:<7} {:>7} {:>9}  {}\n", d["name"].get<std::string>(), d["vendor"].get<std::string>(),
               d.contains("memory_gib") ? fmt::format("{} GiB", d["memory_gib"].get<double>()) : "",
               d.contains("bandwidth_gbps") ? fmt::format("{} GB/s", d["bandwidth_gbps"].get<double>()) : "",
               d.contains("sm") ? fmt::format("compute capability {:.1f}", d["sm"].get<int>() / 10.0) : "");
}

OrderedJson run_presets(const Arguments&, std::vector<Warning>&) {
  OrderedJson presets = OrderedJson::array();
  for (const Json* preset : Facts::standard().all("presets")) presets.push_back(OrderedJson(*preset));
  return {{"presets", presets}};
}

void print_presets(const OrderedJson& result) {
  fmt::print("{:<16} {:<10} {:<10} {:<10} {}\n", "", "gemm", "kv cache", "attention", "experts");
  for (const OrderedJson& p : result["presets"])
    fmt::print("{:<16} {:<10} {:<10} {:<10} {}\n", p["name"].get<std::string>(), p.value("gemm_dtype", "auto"),
               p.value("kvcache_dtype", "auto"), p.value("attention_dtype", "auto"), p.value("moe_dtype", "auto"));
}

}  // namespace

extern const Command formats_command, methods_command, engines_command, hardware_command, presets_command;
const Command formats_command = {.name = "formats",
                                 .summary = "containers that can be read and written",
                                 .takes_model = false,
                                 .run = run_formats,
                                 .print = print_formats};
const Command methods_command = {.name = "methods",
                                 .summary = "algorithms and number types",
                                 .takes_model = false,
                                 .run = run_methods,
                                 .print = print_methods};
const Command engines_command = {.name = "engines",
                                 .summary = "engines that plans are made for",
                                 .takes_model = false,
                                 .options = {{.name = "--matrix",
                                              .type = Option::Type::flag,
                                              .value_name = "",
                                              .help = "Markdown table: each precision field on each engine"}},
                                 .run = run_engines,
                                 .print = print_engines};
const Command hardware_command = {.name = "hardware",
                                  .summary = "devices that are known by name",
                                  .takes_model = false,
                                  .run = run_hardware,
                                  .print = print_hardware};
const Command presets_command = {.name = "presets",
                                 .summary = "presets of the four precision fields",
                                 .takes_model = false,
                                 .run = run_presets,
                                 .print = print_presets};

}  // namespace bitwright
