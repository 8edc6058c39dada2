#include <fmt/format.h>

#include "algorithm/algorithm.hpp"
#include "cli/command.hpp"
#include "container/container.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {
namespace {

OrderedJson run_formats(const Arguments&, std::vector<Warning>&) {
  OrderedJson formats = OrderedJson::array();
  for (const Container* c : all_containers())
    formats.push_back({{"name", c->name},
                       {"reads", true},
                       {"writes", c->write_metadata != nullptr},
                       {"summary", c->summary},
                       {"source", c->source}});
  return {{"formats", formats}};
}

void print_formats(const OrderedJson& result) {
  for (const OrderedJson& f : result["formats"])
    fmt::print("{:<16} {:<11} {}\n", f["name"].get<std::string>(), f["writes"].get<bool>() ? "read, write" : "read",
               f["summary"].get<std::string>());
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

}  // namespace

extern const Command formats_command, methods_command;
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

}  // namespace bitwright
