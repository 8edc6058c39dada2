#include "engine/backends.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "base/nearest.hpp"
#include "engine/condition.hpp"

namespace bitwright {
namespace {

constexpr std::array<AdapterMethod, 9> kMethods = {{{"bnb_nf4", "bitsandbytes", 4, 0.5},
                                                    {"bnb_int8", "bitsandbytes", 8, 1},
                                                    {"hqq", "hqq", 0, 0.5},
                                                    {"mlx_int4", "mlx", 4, 0.5},
                                                    {"mlx_int8", "mlx", 8, 1},
                                                    {"quanto_int2", "optimum-quanto", 2, 0.25},
                                                    {"quanto_int4", "optimum-quanto", 4, 0.5},
                                                    {"quanto_int8", "optimum-quanto", 8, 1},
                                                    {"none", "", 16, 2}}};

const AdapterMethod& method_named(std::string_view name) {
  const auto* row = std::ranges::find(kMethods, name, &AdapterMethod::name);
  if (row != kMethods.end()) return *row;
  std::vector<std::string> known;
  for (const AdapterMethod& method : kMethods) known.emplace_back(method.name);
  throw Error({.code = "unknown-method",
               .what = "unknown quantization method",
               .where = printable(name),
               .fix = suggest(name, known),
               .status = ExitStatus::usage});
}

/// What D1 leaves unsaid.
Json with_defaults(const OrderedJson& config) {
  Json filled = {{"method", "none"}, {"group_size", 64}, {"compute_dtype", "bfloat16"}, {"double_quant", true}};
  if (config.is_object()) filled.update(Json::parse(config.dump()));
  const Json& name = filled["method"];
  const AdapterMethod& method = method_named(name.is_string() ? name.get<std::string>() : name.dump());
  if (!filled.contains("bits") || !filled["bits"].is_number_integer())
    filled["bits"] = method.bits != 0 ? method.bits : 4;
  return filled;
}

}  // namespace

std::vector<AdapterMethod> adapter_methods() { return {kMethods.begin(), kMethods.end()}; }

bool backend_runs(std::string_view backend, std::string_view method, const Facts& facts) {
  const Json& runs = facts.get("backends", backend)["runs"];
  return std::ranges::find(runs, Json(method_named(method).name)) != runs.end();
}

std::vector<Diagnostic> validate_quantization_config(const OrderedJson& config, std::string_view backend,
                                                     const Facts& facts) {
  const Json& row = facts.get("backends", backend);
  const Json asked = with_defaults(config);
  const std::string method = asked["method"];
  const int bits = method_named(method).bits, given = asked["bits"].get<int>();
  std::vector<Diagnostic> found;
  if (!backend_runs(backend, method, facts))
    found.push_back({"BACKEND_UNSUPPORTED",
                     Severity::error,
                     fmt::format("{} does not run {}", row["name"].get<std::string>(), method),
                     {row["fallback"].get<std::string>(), "bitwright's own kernels, on CPU"}});
  if (bits != 0 && given != bits)
    found.push_back({"INVALID_VALUE", Severity::error, fmt::format("{} has {} bits, not {}", method, bits, given)});
  constexpr std::array kHqqBits = {1, 2, 3, 4, 8};
  if (bits == 0 && std::ranges::find(kHqqBits, given) == kHqqBits.end())
    found.push_back(
        {"INVALID_VALUE", Severity::error, fmt::format("{} has 8, 4, 3, 2 or 1 bits, not {}", method, given)});
  for (const Json& rule : row["rules"]) {
    if (rule.contains("when") && !holds(rule["when"], asked)) continue;
    found.push_back({rule["code"], rule.value("severity", "error") == "warning" ? Severity::warning : Severity::error,
                     fill_text(rule["say"].get<std::string>(), asked),
                     rule.value("instead", std::vector<std::string>())});
  }
  return found;
}

OrderedJson get_recommended_config(std::string_view backend, double model_size_b, double available_memory_gb,
                                   const Facts& facts) {
  const Json& row = facts.get("backends", backend);
  const double memory = available_memory_gb * row["usable_memory"].get<double>();
  const double sixteen = 2 * model_size_b, eight = model_size_b;
  constexpr double kSpare = 1.2, kHalfAgain = 1.5;
  const bool cpu_rule = row.contains("eight_bits_below");  // there 8 bits are taken as soon as they fit
  const std::string compute = row["name"] == "mps" ? "float16" : "bfloat16";
  if (memory >= sixteen * kSpare) return {{"method", "none"}, {"bits", 16}, {"compute_dtype", compute}};
  const bool takes_eight = memory >= eight * kHalfAgain ||
                           (cpu_rule && memory >= eight && memory < eight * row["eight_bits_below"].get<double>());
  const std::string method = row[takes_eight ? "eight_bits" : "four_bits"];
  return {{"method", method}, {"bits", takes_eight ? 8 : 4}, {"group_size", 64}, {"compute_dtype", compute}};
}

double adapter_bytes(std::string_view method, double parameters, int bits, int group_size, bool double_quant) {
  const AdapterMethod& row = method_named(method);
  const double codes = row.bits == 16 ? 2 : (row.bits != 0 ? row.bits : bits) / 8.0;
  double scales = 0;  // bytes for each parameter
  const double group = std::max(1, group_size);
  if (row.name == "bnb_nf4") scales = double_quant ? 1.0 / 64 + 4.0 / (64 * 256) : 4.0 / 64;
  if (row.name == "hqq" || row.library == "mlx") scales = 4.0 / group;  // a scale and an offset of 16 bits
  if (row.library == "optimum-quanto" && row.bits < 8) scales = 4.0 / 128;
  return parameters * (codes + scales);
}

OrderedJson report_import_status(const Facts& facts) {
  OrderedJson status = OrderedJson::array();
  for (const AdapterMethod& method : kMethods) {
    OrderedJson backends = OrderedJson::object();
    for (const Json* backend : facts.all("backends")) {
      const std::string name = (*backend)["name"];
      const bool runs = backend_runs(name, method.name, facts);
      backends[name] = {{"usable", runs},
                        {"why", runs ? "" : fmt::format("{} has no {} back end", method.library, name)}};
    }
    status.push_back({{"method", method.name}, {"library", method.library}, {"native", true}, {"backends", backends}});
  }
  return status;
}

}  // namespace bitwright
