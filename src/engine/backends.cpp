#include "engine/backends.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "base/nearest.hpp"
#include "container/container.hpp"
#include "engine/condition.hpp"

namespace bitwright {
namespace {

constexpr std::array<AdapterMethod, 9> kMethods = {{{"bnb_nf4", "bitsandbytes", "bitsandbytes", 4, 0.5},
                                                    {"bnb_int8", "bitsandbytes", "bitsandbytes", 8, 1},
                                                    {"hqq", "hqq", "hqq", 0, 0.5},
                                                    {"mlx_int4", "mlx", "mlx", 4, 0.5},
                                                    {"mlx_int8", "mlx", "mlx", 8, 1},
                                                    {"quanto_int2", "optimum-quanto", "quanto", 2, 0.25},
                                                    {"quanto_int4", "optimum-quanto", "quanto", 4, 0.5},
                                                    {"quanto_int8", "optimum-quanto", "quanto", 8, 1},
                                                    {"none", "", "", 16, 2}}};

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

/// The members of a configuration (D1) and what may stand in them.
struct Key {
  std::string_view name;
  bool (*is_good)(const Json& value);
  std::string_view needs;
};
bool is_text(const Json& value) { return value.is_string(); }
bool is_flag(const Json& value) { return value.is_boolean(); }
bool is_object(const Json& value) { return value.is_object(); }
bool is_count(const Json& value) { return value.is_number_integer() && value > 0; }
bool is_list_of_text(const Json& value) { return value.is_array() && std::ranges::all_of(value, is_text); }
bool is_float_type(const Json& value) { return value == "float16" || value == "bfloat16" || value == "float32"; }
constexpr std::array<Key, 10> kKeys = {
    {{"method", is_text, "text"},
     {"bits", is_count, "a whole number"},
     {"group_size", is_count, "a whole number"},
     {"compute_dtype", is_float_type, "float16, bfloat16 or float32"},
     {"storage_dtype", is_text, "text"},
     {"double_quant", is_flag, "true or false"},
     {"quant_type", [](const Json& v) { return v == "nf4" || v == "fp4"; }, "nf4 or fp4"},
     {"skip_modules", is_list_of_text, "a list of names"},
     {"layer_configs", is_object, "a mapping"},
     {"backend_options", is_object, "a mapping"}}};

/// What is wrong with the form of a configuration; members that are wrong are dropped from it.
void check_form(Json& config, std::vector<Diagnostic>& found) {
  const Json given = config;
  for (const auto& [name, value] : given.items()) {
    const auto* key = std::ranges::find(kKeys, name, &Key::name);
    if (key == kKeys.end()) {
      std::vector<std::string> known;
      for (const Key& one : kKeys) known.emplace_back(one.name);
      found.push_back(
          {"UNKNOWN_KEY", Severity::error, fmt::format("there is no '{}'", printable(name)), {suggest(name, known)}});
    } else if (!value.is_null() && !key->is_good(value)) {
      found.push_back({"INVALID_VALUE", Severity::error,
                       fmt::format("{} {}: it needs {}", name, printable(value.dump()), key->needs)});
    } else if (!value.is_null()) {
      continue;
    }
    config.erase(name);
  }
}

/// What D1 leaves unsaid.
Json with_defaults(const OrderedJson& config, std::vector<Diagnostic>& found) {
  Json given = config.is_object() ? Json::parse(config.dump()) : Json::object();
  check_form(given, found);
  Json filled = {{"method", "none"}, {"group_size", 64}, {"compute_dtype", "bfloat16"}, {"double_quant", true}};
  filled.update(given);
  const AdapterMethod& method = method_named(filled["method"].get<std::string>());
  if (!filled.contains("bits")) filled["bits"] = method.bits != 0 ? method.bits : 4;
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
  std::vector<Diagnostic> found;
  const Json asked = with_defaults(config, found);
  const std::string method = asked["method"];
  const int bits = method_named(method).bits, given = asked["bits"].get<int>();
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
    const Container* container = method.container.empty() ? nullptr : find_container(method.container);
    const bool usable = container != nullptr || method.name == "none";
    const std::string why = usable ? "" : fmt::format("this build has no container for {}", method.name);
    status.push_back(
        {{"method", method.name},
         {"library", method.library},
         {"usable", usable},
         {"why", why},
         {"reads", usable},
         {"writes", method.name == "none" || (container != nullptr && container->write_metadata != nullptr)},
         {"backends", backends}});
  }
  return status;
}

}  // namespace bitwright
