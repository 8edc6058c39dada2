#include "cli/plan_page.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace bitwright {
namespace {

std::string gib(const OrderedJson& bytes) { return fmt::format("{:.2f} GiB", bytes.get<double>() / 1073741824.0); }

/// The parts of the memory, drawn to scale: weights, KV cache, the rest, free.
void print_memory(const OrderedJson& p) {
  fmt::print("memory      weights {}, KV cache {} ({} tokens x {}), activations {}: {}\n", gib(p["weights_bytes"]),
             gib(p["kv_cache_bytes"]), p["context"].get<int64_t>(), p["batch"].get<int64_t>(),
             gib(p["activation_bytes"]), gib(p["total_bytes"]));
  if (!p.contains("fits")) return;
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
  fmt::print("            [{:<50}] of {}: {}\n", bar, gib(p["memory_bytes"]),
             p["fits"].get<bool>() ? "fits" : "does not fit");
  fmt::print("            fits up to {} tokens, or {} sequences\n", p["most_context"].get<int64_t>(),
             p["most_batch"].get<int64_t>());
}

void print_one(const OrderedJson& plan) {
  const OrderedJson& engine = plan["engine"];
  const std::string checkpoint = plan["checkpoint"]["method"].get<std::string>();
  fmt::print("{} {}{}: {}\n", engine["name"].get<std::string>(), engine["version"].get<std::string>(),
             plan["hardware"].is_string() ? " on " + plan["hardware"].get<std::string>() : "",
             engine["outcome"].get<std::string>());
  fmt::print("asked       method {}; {}\n", plan["intent"].get<std::string>(), plan["quant_config"].get<std::string>());
  fmt::print("checkpoint  {}\n", checkpoint.empty() ? "not quantized"
                                                    : fmt::format("{} ({}, {} bits)", checkpoint,
                                                                  plan["checkpoint"]["scheme"].get<std::string>(),
                                                                  plan["checkpoint"]["bits"].get<double>()));
  print_memory(plan["predicted"]);
  if (plan.contains("recommend")) {
    for (const OrderedJson& r : plan["recommend"])
      fmt::print("            {:<5} {:>4} bits: {:>10}{}\n", r["method"].get<std::string>(), r["bits"].get<double>(),
                 gib(r["total_bytes"]), r["fits"].get<bool>() ? "" : ", does not fit");
    fmt::print("recommended {}\n", plan["recommended"].is_string()
                                       ? "--method " + plan["recommended"].get<std::string>()
                                       : "a larger device: not even 2 bits fit");
  }
  if (plan.contains("changes"))
    for (const OrderedJson& c : plan["changes"])
      fmt::print("changed     {}: {} -> {}\n", c["field"].get<std::string>(), c["from"].get<std::string>(),
                 c["to"].get<std::string>());
  for (const char* part : {"api", "config_file"})
    if (!engine[part].empty()) fmt::print("{:<11} {}\n", part, engine[part].dump());
  if (plan["explain"].get<bool>())
    for (const OrderedJson& a : engine["explained"])
      fmt::print("argument    {} {}: {}{}\n", a["flag"].get<std::string>(),
                 a["value"].is_string() ? a["value"].get<std::string>() : a["value"].dump(),
                 a["rule"].get<std::string>(),
                 a["source"].get<std::string>().empty() ? "" : " (" + a["source"].get<std::string>() + ")");
  for (const OrderedJson& e : plan["errors"]) {
    fmt::print("error[{}]: {}\n", e["code"].get<std::string>(), e["message"].get<std::string>());
    for (const OrderedJson& instead : e["instead"]) fmt::print("  instead: {}\n", instead.get<std::string>());
  }
  if (plan.contains("nearest")) {
    fmt::print("nearest plan that works (--adapt):\n");
    for (const OrderedJson& c : plan["nearest"])
      fmt::print("  {}: {} -> {}\n", c["field"].get<std::string>(), c["from"].get<std::string>(),
                 c["to"].get<std::string>());
  }
  if (plan["errors"].empty()) fmt::print("\n{}\n", engine["command"].get<std::string>());
}

}  // namespace

void print_plan(const OrderedJson& result) {
  if (!result.contains("plans")) return print_one(result);
  for (const OrderedJson& plan : result["plans"]) {
    print_one(plan);
    fmt::print("\n");
  }
}

}  // namespace bitwright
