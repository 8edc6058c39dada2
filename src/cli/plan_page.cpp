#include "cli/plan_page.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "cli/page.hpp"
#include "cli/tensor_groups.hpp"
#include "engine/facts.hpp"

namespace bitwright {
namespace {

constexpr size_t kIndent = 12;  // where what follows a line's title begins

std::string text_of(const OrderedJson& object, const char* member) {
  const auto found = object.find(member);
  if (found == object.end() || found->is_null()) return {};
  return found->is_string() ? found->get<std::string>() : found->dump();
}

void print_line(std::string_view title, const std::string& text) {
  fmt::print("{:<11} {}\n", title, wrapped(text, kIndent));
}

std::string in_brackets(const std::string& text) { return text.empty() ? text : " (" + text + ")"; }

std::string outcome_of(const OrderedJson& plan) {
  const std::string outcome = text_of(plan["engine"], "outcome");
  return coloured(outcome, outcome == "ok" ? Colour::green : outcome == "warning" ? Colour::yellow : Colour::red);
}

std::string engine_of(const OrderedJson& plan) {
  const OrderedJson& engine = plan["engine"];
  const std::string device = text_of(plan, "hardware");
  return fmt::format("{} {}{}", text_of(engine, "name"), text_of(engine, "version"),
                     device.empty() ? "" : " on " + device);
}

/// The parts of the memory, drawn to scale: weights, KV cache, the rest, free.
std::string memory_bar(const OrderedJson& p) {
  constexpr double kWidth = 50;
  const double memory = p["memory_bytes"].get<double>();
  std::string bar;
  const auto draw = [&](double bytes, char sign) {
    const auto cells = static_cast<size_t>(std::llround(std::min(1.0, memory > 0 ? bytes / memory : 1.0) * kWidth));
    bar.append(std::min(cells, static_cast<size_t>(kWidth) - bar.size()), sign);
  };
  draw(p["weights_bytes"].get<double>(), '#');
  draw(p["kv_cache_bytes"].get<double>(), '=');
  draw(p["activation_bytes"].get<double>() + p["overhead_bytes"].get<double>(), '-');
  return fmt::format("[{:<50}]", bar);
}

std::string size_at(const OrderedJson& object, const char* member) {
  return object[member].is_number() ? size_text(object[member].get<double>()) : "unknown";
}

/// "up to 8192 tokens, or 12 sequences": the largest that fit, each with the other as asked.
std::string limits_of(const OrderedJson& p) {
  const auto context = p["most_context"].get<int64_t>(), batch = p["most_batch"].get<int64_t>();
  if (context == 0 && batch == 0) return "not a single token fits beside the weights";
  return fmt::format("fits up to {} tokens, or {} sequences", context, batch);
}

void print_memory(const OrderedJson& p) {
  const double rest = p["activation_bytes"].get<double>() + p["overhead_bytes"].get<double>();
  const int64_t devices = p.value("devices", int64_t{1});
  print_line("memory", fmt::format("{}{}: weights {} #, KV cache {} = ({} tokens x {}), the rest {} -",
                                   size_at(p, "total_bytes"), devices > 1 ? fmt::format(" on each of {}", devices) : "",
                                   size_at(p, "weights_bytes"), size_at(p, "kv_cache_bytes"),
                                   p["context"].get<int64_t>(), p["batch"].get<int64_t>(), size_text(rest)));
  if (!p.contains("fits")) return;
  const bool fits = p["fits"].get<bool>();
  fmt::print("            {} of {}: {}\n", memory_bar(p), size_at(p, "memory_bytes"),
             coloured(fits ? "fits" : "does not fit", fits ? Colour::green : Colour::red));
  fmt::print("            {}\n", limits_of(p));
}

/// What the weights become: the whole in a line, then the tensors that are alike, largest first.
void print_tensors(const OrderedJson& plan) {
  if (!plan.contains("tensors") || plan["tensors"].empty()) return;
  const std::string scheme = text_of(plan, "scheme"), algorithm = text_of(plan, "algorithm");
  const std::string container = text_of(plan, "container");
  const OrderedJson& predicted = plan["predicted"];
  std::vector<TensorGroup> groups = group_tensors(plan["tensors"]);
  const bool unchanged = std::ranges::all_of(
      groups, [&](const TensorGroup& g) { return g.scheme.empty() && g.reason == groups.front().reason; });
  std::string line = (scheme.empty() ? "unchanged" : scheme) + (algorithm.empty() ? "" : " by " + algorithm);
  if (!container.empty()) line += ", container " + container;
  if (predicted.contains("bytes") && predicted["bytes"].is_number()) line += ": " + size_at(predicted, "bytes");
  print_line("weights", line + (unchanged && !groups.empty() ? in_brackets(groups.front().reason) : ""));
  if (unchanged) return;
  constexpr size_t kMost = 12;  // one screen
  std::vector<std::vector<std::string>> rows;
  std::ranges::stable_sort(groups, std::ranges::greater(), &TensorGroup::bytes);
  for (const TensorGroup& group : groups) {
    if (rows.size() == kMost) break;
    std::string names;
    for (const std::string& name : group.names) names += (names.empty() ? "" : " ") + name;
    if (group.count > 1) names += fmt::format(" x{}", group.count);
    const bool other = group.algorithm != algorithm && !group.algorithm.empty();
    rows.push_back({size_text(group.bytes),
                    group.scheme.empty() ? "unchanged" : group.scheme + (other ? " by " + group.algorithm : ""),
                    names + (group.reason.empty() ? "" : ": " + group.reason)});
  }
  fmt::print("{}", columns(rows, kIndent));
  if (groups.size() > kMost) fmt::print("            and {} more groups (--json lists all)\n", groups.size() - kMost);
}

void print_recommendation(const OrderedJson& plan) {
  if (!plan.contains("recommend")) return;
  for (const OrderedJson& r : plan["recommend"])
    fmt::print("            {:<5} {:>4} bits: {:>10}{}\n", text_of(r, "method"), r["bits"].get<double>(),
               size_at(r, "total_bytes"), r["fits"].get<bool>() ? "" : ", does not fit");
  print_line("recommended", plan["recommended"].is_string() ? "--method " + text_of(plan, "recommended")
                                                            : "a larger device: not even 2 bits fit");
}

/// For every argument the rule and the source; for every request what became of it; what the user's own replaced.
void print_explanation(const OrderedJson& engine) {
  const auto place_of = [](const OrderedJson& a) -> std::string {
    const std::string place = text_of(a, "place");
    return place == "config" ? "config file"
           : place == "api"  ? "Python call"
           : place == "env"  ? "environment"
                             : "argument";
  };
  for (const OrderedJson& a : engine["explained"])
    print_line(place_of(a), fmt::format("{} {}: {}{}", text_of(a, "flag"), text_of(a, "value"), text_of(a, "rule"),
                                        in_brackets(text_of(a, "source"))));
  for (const OrderedJson& a : engine["answers"])
    print_line("asked for", fmt::format("{} {}{}: {}, {}{}", text_of(a, "field"), text_of(a, "value"),
                                        in_brackets(text_of(a, "from")), text_of(a, "outcome"), text_of(a, "why"),
                                        in_brackets(text_of(a, "source"))));
  for (const OrderedJson& o : engine["overrides"])
    print_line("overridden", fmt::format("{} {} is given; {} would have made it {}", text_of(o, "flag"),
                                         text_of(o, "given"), text_of(o, "rule"), text_of(o, "derived")));
  for (const auto& [name, value] : engine["resolved"].items())
    print_line("engine uses", fmt::format("{} {}", name, text_of(engine["resolved"], name.c_str())));
}

void print_changes(const OrderedJson& changes, const char* title) {
  for (const OrderedJson& c : changes)
    print_line(title, fmt::format("{}: {} -> {}", text_of(c, "field"), text_of(c, "from"), text_of(c, "to")));
}

void print_errors(const OrderedJson& plan) {
  for (const OrderedJson& e : plan["errors"]) {
    fmt::print(
        "{}\n",
        wrapped(coloured(fmt::format("error[{}]:", text_of(e, "code")), Colour::red) + " " + text_of(e, "message"), 2));
    for (const OrderedJson& instead : e["instead"]) fmt::print("  instead: {}\n", instead.get<std::string>());
  }
  if (!plan.contains("nearest")) return;
  fmt::print("nearest plan that works (--adapt):\n");
  for (const OrderedJson& c : plan["nearest"])
    fmt::print("  {}: {} -> {}\n", text_of(c, "field"), text_of(c, "from"), text_of(c, "to"));
}

/// The lines to paste: the configuration file where there is one (JSON is YAML), then the command.
void print_command(const OrderedJson& plan) {
  const OrderedJson& engine = plan["engine"];
  if (!plan["errors"].empty()) {  // what was derived is shown all the same
    if (!engine["config_file"].empty()) fmt::print("config file {}\n", engine["config_file"].dump());
    return;
  }
  if (!engine["config_file"].empty()) {
    const std::string option = Facts::standard().get("engines", text_of(engine, "name")).value("config_file", "");
    fmt::print("cat > {} <<'END'\n{}\nEND\n", option.substr(option.rfind(' ') + 1), engine["config_file"].dump());
  }
  if (const std::string quantize = text_of(plan, "quantize"); !quantize.empty()) fmt::print("{}\n", quantize);
  fmt::print("{}\n", text_of(engine, "command"));
}

void print_checkpoint(const OrderedJson& checkpoint) {
  const std::string method = text_of(checkpoint, "method"), scheme = text_of(checkpoint, "scheme");
  if (method.empty()) return print_line("checkpoint", "not quantized");
  const double bits = checkpoint["bits"].get<double>();
  std::string details = scheme;
  if (bits > 0) details += fmt::format("{}{:.4g} bits", details.empty() ? "" : ", ", bits);
  print_line("checkpoint", method + in_brackets(details));
}

void print_details(const OrderedJson& plan) {
  if (plan.contains("changes")) print_changes(plan["changes"], "changed");
  if (plan["explain"].get<bool>()) print_explanation(plan["engine"]);
  print_errors(plan);
  print_command(plan);
}

void print_one(const OrderedJson& plan) {
  fmt::print("{}: {}\n", engine_of(plan), outcome_of(plan));
  print_line("asked", fmt::format("method {}; {}", text_of(plan, "intent"), text_of(plan, "quant_config")));
  print_checkpoint(plan["checkpoint"]);
  print_tensors(plan);
  print_memory(plan["predicted"]);
  print_recommendation(plan);
  print_details(plan);
}

/// Several plans: a row for each to compare, then what each engine is told.
void print_several(const OrderedJson& plans) {
  std::vector<std::vector<std::string>> rows;
  for (const OrderedJson& plan : plans) {
    std::string codes;
    for (const char* said : {"errors", "warnings"})
      if (plan.contains(said))
        for (const OrderedJson& one : plan[said]) codes += (codes.empty() ? "" : " ") + text_of(one, "code");
    const OrderedJson& p = plan["predicted"];
    rows.push_back({engine_of(plan), text_of(plan, "quant_config"), text_of(plan["engine"], "outcome"),
                    size_at(p, "total_bytes") + (p.contains("fits") && !p["fits"].get<bool>() ? ", does not fit" : ""),
                    codes});
  }
  fmt::print("{}", columns(rows));
  for (const OrderedJson& plan : plans) {
    fmt::print("\n{}, {}\n", text_of(plan["engine"], "name"), text_of(plan, "quant_config"));
    print_details(plan);
  }
}

}  // namespace

void print_plan(const OrderedJson& result) {
  if (result.contains("plans"))
    print_several(result["plans"]);
  else
    print_one(result);
}

}  // namespace bitwright
