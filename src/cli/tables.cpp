#include <fmt/format.h>
#include <fmt/ranges.h>

#include "algorithm/algorithm.hpp"
#include "cli/command.hpp"
#include "cli/page.hpp"
#include "container/container.hpp"
#include "engine/backends.hpp"
#include "engine/describe.hpp"
#include "engine/plan.hpp"
#include "engine/precision.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {
namespace {

/// The engines that load what is quantized so, each with the least compute capability where there is one.
OrderedJson engines_that_take(std::string_view method) {
  OrderedJson engines = OrderedJson::array();
  for (const Json* engine : Facts::standard().all("engines")) {
    const auto name = (*engine)["name"].get<std::string>();
    const Takes takes = takes_checkpoint(name, method);
    if (!takes.taken) continue;
    engines.push_back({{"name", name}});
    if (takes.min_sm != 0) engines.back()["min_sm"] = takes.min_sm;
    if (!takes.code.empty()) engines.back()["warning"] = takes.code;
  }
  return engines;
}

OrderedJson run_formats(const Arguments&, std::vector<Warning>&) {
  OrderedJson formats = OrderedJson::array();
  for (const Container* c : all_containers())
    formats.push_back({{"name", c->name},
                       {"reads", true},
                       {"writes", c->write_metadata != nullptr},
                       {"engines", engines_that_take(method_of(*c))},
                       {"summary", c->summary},
                       {"source", c->source}});
  return {{"formats", formats}};
}

void print_formats(const OrderedJson& result) {
  constexpr size_t kIndent = 29;
  for (const OrderedJson& f : result["formats"]) {
    fmt::print("{:<16} {:<11} {}\n", f["name"].get<std::string>(), f["writes"].get<bool>() ? "read, write" : "read",
               f["summary"].get<std::string>());
    std::string engines;
    for (const OrderedJson& e : f["engines"])
      engines += (engines.empty() ? "" : ", ") + e["name"].get<std::string>() +
                 (e.contains("min_sm") ? fmt::format(" ({}+)", capability_text(e["min_sm"].get<int>())) : "");
    fmt::print("{}engines: {}\n", std::string(kIndent, ' '), wrapped(engines, kIndent + 9));
  }
}

/// What the weights may be asked to be, and the engines that make them so from a 16-bit checkpoint while loading.
OrderedJson intents() {
  OrderedJson rows = OrderedJson::array();
  for (const std::string& method : intent_methods()) {
    if (method == "none" || method == "auto") continue;
    rows.push_back({{"name", method}, {"bits", bits_of(method)}, {"at_load", OrderedJson::array()}});
    for (const Json* engine : Facts::standard().all("engines")) {
      PlanRequest request{.engine = (*engine)["name"]};
      request.intent.method = method;
      const EnginePlan plan = plan_engine(request);
      const bool sets = !plan.args.empty() || !plan.api.empty() || !plan.config_file.empty();
      if (sets && plan.outcome != "error") rows.back()["at_load"].push_back(request.engine);
    }
  }
  return rows;
}

OrderedJson run_methods(const Arguments&, std::vector<Warning>&) {
  OrderedJson algorithms = OrderedJson::array(), elements = OrderedJson::array();
  for (const Algorithm* a : all_algorithms())
    algorithms.push_back({{"name", a->name}, {"summary", a->summary}, {"source", a->source}});
  for (const ElementType* e : all_elements())
    elements.push_back({{"name", e->name}, {"bits", e->bits}, {"source", e->source}});
  return {{"algorithms", algorithms},
          {"elements", elements},
          {"intents", intents()},
          {"libraries", report_import_status()}};
}

void print_methods(const OrderedJson& result) {
  for (const OrderedJson& a : result["algorithms"])
    fmt::print("{:<16} {}\n", a["name"].get<std::string>(), a["summary"].get<std::string>());
  std::string names;
  for (const OrderedJson& e : result["elements"]) names += " " + e["name"].get<std::string>();
  fmt::print("\nelements:{}\n", names);
  std::vector<std::vector<std::string>> rows;
  for (const OrderedJson& i : result["intents"])
    rows.push_back({i["name"].get<std::string>(),
                    i["bits"].get<int>() > 0 ? fmt::format("{} bits", i["bits"].get<int>()) : "",
                    fmt::format("{}", fmt::join(i["at_load"].get<std::vector<std::string>>(), ", "))});
  fmt::print("\nmethods of a plan, and the engines that quantize so while loading\n{}", columns(rows, 2));
  rows.clear();
  for (const OrderedJson& l : result["libraries"]) {
    std::string backends;
    for (const auto& [backend, status] : l["backends"].items())
      if (status["usable"].get<bool>()) backends += (backends.empty() ? "" : ", ") + backend;
    rows.push_back({l["method"].get<std::string>(), l["library"].get<std::string>(), backends});
  }
  fmt::print("\nmethods of libraries, and the back ends that each runs on there\n{}", columns(rows, 2));
}

OrderedJson run_hardware(const Arguments& arguments, std::vector<Warning>&) {
  if (!arguments.chosen.empty()) return {{"device", OrderedJson(Facts::standard().get("hardware", arguments.chosen))}};
  OrderedJson devices = OrderedJson::array();
  for (const Json* device : Facts::standard().all("hardware")) devices.push_back(OrderedJson(*device));
  return {{"hardware", devices}};
}

void print_device(const OrderedJson& d) {
  constexpr size_t kIndent = 13;
  const auto line = [](const char* title, const std::string& text) {
    if (!text.empty()) fmt::print("{:<12} {}\n", title, wrapped(text, kIndent));
  };
  const auto list = [&](const char* member) {
    return d.contains(member) ? fmt::format("{}", fmt::join(d[member].get<std::vector<std::string>>(), ", ")) : "";
  };
  fmt::print("{}: {} {} {}\n", d["name"].get<std::string>(), d["vendor"].get<std::string>(),
             d.value("architecture", ""), d["kind"].get<std::string>());
  line("also called", list("aliases"));
  if (d.contains("sm")) line("capability", capability_text(d["sm"].get<int>()));
  line("instructions", list("instructions"));
  if (d.contains("memory_gib")) line("memory", fmt::format("{} GiB", d["memory_gib"].get<double>()));
  if (d.contains("bandwidth_gbps")) line("bandwidth", fmt::format("{} GB/s", d["bandwidth_gbps"].get<double>()));
  line("computes in", list("dtypes"));
  line("note", d.value("note", ""));
  line("facts from", d["source"].get<std::string>());
}

void print_hardware(const OrderedJson& result) {
  if (result.contains("device")) return print_device(result["device"]);
  for (const OrderedJson& d : result["hardware"])
    fmt::print("{:<18} {:<7} {:>7} {:>9}  {}\n", d["name"].get<std::string>(), d["vendor"].get<std::string>(),
               d.contains("memory_gib") ? fmt::format("{} GiB", d["memory_gib"].get<double>()) : "",
               d.contains("bandwidth_gbps") ? fmt::format("{} GB/s", d["bandwidth_gbps"].get<double>()) : "",
               d.contains("sm") ? "compute capability " + capability_text(d["sm"].get<int>()) : "");
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

extern const Command formats_command, methods_command, hardware_command, presets_command;
const Command formats_command = {.name = "formats",
                                 .summary = "containers that can be read and written, and which engines load them",
                                 .takes_model = false,
                                 .run = run_formats,
                                 .print = print_formats};
const Command methods_command = {.name = "methods",
                                 .summary = "algorithms, number types, methods of plans and of libraries",
                                 .takes_model = false,
                                 .run = run_methods,
                                 .print = print_methods};
const Command hardware_command = {.name = "hardware",
                                  .summary = "devices that are known by name",
                                  .takes_model = false,
                                  .takes_name = "one device, with what it computes in and where that is from",
                                  .run = run_hardware,
                                  .print = print_hardware};
const Command presets_command = {.name = "presets",
                                 .summary = "presets of the four precision fields",
                                 .takes_model = false,
                                 .run = run_presets,
                                 .print = print_presets};

}  // namespace bitwright
