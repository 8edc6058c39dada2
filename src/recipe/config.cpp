#include "recipe/config.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "algorithm/algorithm.hpp"
#include "base/error.hpp"
#include "base/nearest.hpp"

namespace bitwright {
namespace {

using Type = ConfigKey::Type;

std::vector<std::string> algorithm_names() {
  std::vector<std::string> names = {"auto"};
  for (const Algorithm* algorithm : all_algorithms()) names.emplace_back(algorithm->name);
  return names;
}

std::vector<ConfigKey> make_keys() {
  return {
      {.path = "model", .type = Type::text, .fallback = "", .help = "the model to work on"},
      {.path = "quantization.method",
       .type = Type::text,
       .fallback = "none",
       .help = "what you want; the keys below refine it",
       .values = {"none",   "int8",   "int4",   "int3",   "int2",   "nf4",    "fp4",    "fp8",    "mxfp4",
                  "mxfp8",  "nvfp4",  "auto",   "q8_0",   "q4_0",   "q4_1",   "q5_0",   "q5_1",   "q2_k",
                  "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
                  "iq4_nl", "iq4_xs", "tq1_0",  "tq2_0",  "f32",    "f16",    "bf16"},
       .per_layer = true},
      {.path = "quantization.weight_only",
       .type = Type::boolean,
       .fallback = "true; false for fp8 where the container has activations",
       .help = "activations stay in floating point; false: they are quantized while the model runs",
       .per_layer = true},
      {.path = "quantization.mode",
       .type = Type::text,
       .fallback = "dynamic",
       .help = "when scales of quantized activations are found",
       .values = {"static", "dynamic"},
       .plan_only = true},
      {.path = "quantization.backend_method",
       .type = Type::text,
       .fallback = "",
       .help = "the engine's own name of a method",
       .plan_only = true},
      {.path = "quantization.algorithm",
       .type = Type::text,
       .fallback = "auto",
       .help = "how codes are chosen",
       .values = algorithm_names(),
       .per_layer = true},
      {.path = "quantization.range",
       .type = Type::text,
       .fallback = "minmax from 8 bits on, mse below",
       .help = "a group's range: its extremes, or least squared error",
       .values = {"auto", "minmax", "mse"},
       .per_layer = true},
      {.path = "quantization.scheme.bits",
       .type = Type::integer,
       .fallback = "from the method",
       .help = "bits of an integer code",
       .least = 1,
       .most = 8,
       .per_layer = true},
      {.path = "quantization.scheme.symmetric",
       .type = Type::boolean,
       .fallback = "true at 8 bits, else false",
       .help = "no zero point",
       .per_layer = true},
      {.path = "quantization.scheme.granularity",
       .type = Type::text,
       .fallback = "channel at 8 bits, else group",
       .help = "what shares a scale; flat: groups over the flattened weight, across rows; block: squares",
       .values = {"tensor", "channel", "group", "flat", "block"},
       .per_layer = true},
      {.path = "quantization.scheme.group_size",
       .type = Type::integer,
       .fallback = "64, or the container's",
       .help = "weights that share a scale; the side of a block",
       .least = 1,
       .most = 1 << 20,
       .per_layer = true},
      {.path = "quantization.scheme.scale_dtype",
       .type = Type::text,
       .fallback = "float16; float32 for nf4 and fp4; or the container's",
       .help = "type of the scales",
       .values = {"float32", "float16", "bfloat16"},
       .per_layer = true},
      {.path = "quantization.scheme.nested_scales",
       .type = Type::boolean,
       .fallback = "false",
       .help = "quantize the scales again (double quantization)",
       .per_layer = true},
      {.path = "quantization.scheme.quant_type",
       .type = Type::text,
       .fallback = "from the method",
       .help = "kind of code",
       .values = {"int", "nf4", "fp4", "e4m3", "e5m2", "mxfp4", "mxfp8", "nvfp4"},
       .per_layer = true},
      {.path = "quantization.scheme.block_shape",
       .type = Type::integers,
       .fallback = "",
       .help = "rows and columns that share a scale",
       .plan_only = true},
      {.path = "quantization.compute_dtype",
       .type = Type::text,
       .fallback = "the model's",
       .help = "type that products are computed in",
       .values = {"float32", "float16", "bfloat16"},
       .plan_only = true},
      {.path = "quantization.skip_modules",
       .type = Type::names,
       .fallback = "lm_head",
       .help = "modules kept in full precision (names, prefixes, globs)"},
      {.path = "quantization.layer_configs",
       .type = Type::rules,
       .fallback = "",
       .help = "settings by module; the first match wins"},
      {.path = "quantization.load_in_4bit",
       .type = Type::boolean,
       .fallback = "",
       .help = "what older configurations call method int4",
       .plan_only = true},
      {.path = "quantization.load_in_8bit",
       .type = Type::boolean,
       .fallback = "",
       .help = "what older configurations call method int8",
       .plan_only = true},
      {.path = "quantization.calibration.dataset",
       .type = Type::text,
       .fallback = "",
       .help = "text that algorithms learn from",
       .plan_only = true,
       .option = "--calibration"},
      {.path = "quantization.calibration.split",
       .type = Type::text,
       .fallback = "train",
       .help = "part of the dataset",
       .plan_only = true,
       .option = "--calibration-split"},
      {.path = "quantization.calibration.num_samples",
       .type = Type::integer,
       .fallback = "512",
       .help = "pieces of the text",
       .least = 1,
       .most = 1 << 20,
       .plan_only = true,
       .option = "--calibration-samples"},
      {.path = "quantization.calibration.max_length",
       .type = Type::integer,
       .fallback = "2048",
       .help = "tokens of a piece",
       .least = 1,
       .most = 1 << 20,
       .plan_only = true,
       .option = "--calibration-length"},
      {.path = "quantization.calibration.seed",
       .type = Type::integer,
       .fallback = "0",
       .help = "of the choice of pieces",
       .least = 0,
       .most = INT32_MAX,
       .plan_only = true,
       .option = "--calibration-seed"},
      {.path = "quantization.budget",
       .type = Type::text,
       .fallback = "",
       .help = "4.25bpw or 6GiB: bits are given to layers within it",
       .plan_only = true},
      // What follows tells engines what to do with a model. The values are theirs: plan knows them.
      {.path = "quant_config.preset",
       .type = Type::text,
       .fallback = "",
       .help = "preset of the four fields",
       .plan_only = true},
      {.path = "quant_config.presets",
       .type = Type::names,
       .fallback = "",
       .help = "several, a plan for each",
       .plan_only = true},
      {.path = "quant_config.gemm_dtype",
       .type = Type::text,
       .fallback = "auto",
       .help = "type of matrix products",
       .plan_only = true},
      {.path = "quant_config.kvcache_dtype",
       .type = Type::text,
       .fallback = "auto",
       .help = "type of the KV cache",
       .plan_only = true},
      {.path = "quant_config.attention_dtype",
       .type = Type::text,
       .fallback = "auto",
       .help = "type of attention",
       .plan_only = true},
      {.path = "quant_config.moe_dtype",
       .type = Type::text,
       .fallback = "auto",
       .help = "type of experts",
       .plan_only = true},
      {.path = "engine.name",
       .type = Type::text,
       .fallback = "native",
       .help = "engine to plan for",
       .plan_only = true,
       .option = "--engine",
       .short_form = true},
      {.path = "engine.version",
       .type = Type::text,
       .fallback = "the one the facts were read from",
       .help = "its version",
       .plan_only = true,
       .option = "--engine-version"},
      {.path = "engines",
       .type = Type::engines,
       .fallback = "",
       .help = "several engines, each with what it overrides",
       .plan_only = true},
      {.path = "hardware",
       .type = Type::text,
       .fallback = "",
       .help = "device, as `bitwright hardware` lists them, or local",
       .plan_only = true,
       .option = "--hardware"},
      {.path = "parameters",
       .type = Type::arguments,
       .fallback = "",
       .help = "an argument of the engine's own, NAME or NAME=VALUE; always wins; may be repeated",
       .plan_only = true,
       .option = "--parameter"},
  };
}

std::string_view last_name(std::string_view path) {
  const size_t dot = path.rfind('.');
  return dot == std::string_view::npos ? path : path.substr(dot + 1);
}

std::string shown(const OrderedJson& value) {
  return value.is_string() ? value.get<std::string>()
                           : value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

/// A member of an object, or of nothing yet.
OrderedJson& member(OrderedJson& object, const std::string& name, std::string_view path) {
  if (!object.is_object() && !object.is_null())
    throw Error({.code = "bad-value",
                 .what = "bad configuration",
                 .where = std::string(path),
                 .why = fmt::format("'{}' cannot be set inside a plain value", printable(name)),
                 .status = ExitStatus::usage});
  return object[name];
}

[[noreturn]] void bad_value(const std::string& where, std::string_view key, const OrderedJson& value,
                            const std::string& why) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = where,
               .why = fmt::format("{}: '{}' {}", key, printable(shown(value)), why),
               .status = ExitStatus::usage});
}

void check_value(const ConfigKey& key, const OrderedJson& value, const std::string& where) {
  const auto fail = [&](const std::string& why) { bad_value(where, key.path, value, why); };
  switch (key.type) {
    case Type::text:
      if (!value.is_string()) fail("is no text");
      break;
    case Type::boolean:
      if (!value.is_boolean()) fail("is neither true nor false");
      break;
    case Type::integer:
      if (!value.is_number_integer()) fail("is no whole number");
      if (value.get<int64_t>() < key.least || value.get<int64_t>() > key.most)
        fail(fmt::format("is not between {} and {}", key.least, key.most));
      break;
    case Type::names:
      if (!value.is_array() || !std::ranges::all_of(value, [](const OrderedJson& item) { return item.is_string(); }))
        fail("is no list of names");
      break;
    case Type::integers:
      if (!value.is_array() || !std::ranges::all_of(value, [](const OrderedJson& v) { return v.is_number_integer(); }))
        fail("is no list of whole numbers");
      break;
    case Type::arguments:
      if (!value.is_object()) fail("is no mapping of names to values");
      break;
    case Type::rules:
    case Type::engines:
      break;
  }
  if (!key.values.empty() && std::ranges::find(key.values, shown(value)) == key.values.end())
    fail(fmt::format("is not known; valid: {}", fmt::join(key.values, ", ")));
}

void check_rules(const OrderedJson& rules, std::string_view path, const std::string& where) {
  if (!rules.is_object()) bad_value(where, path, rules, "is no mapping of modules to settings");
  for (const auto& [pattern, settings] : rules.items()) {
    const std::string at = fmt::format("{}.{}", path, pattern);
    if (!settings.is_object()) bad_value(where, at, settings, "is no mapping of settings");
    for (const auto& [name, value] : settings.items()) {
      std::vector<std::string> known;
      const ConfigKey* found = nullptr;
      for (const ConfigKey& key : config_keys()) {
        if (!key.per_layer) continue;
        known.emplace_back(last_name(key.path));
        if (known.back() == name) found = &key;
      }
      if (found == nullptr)
        throw Error({.code = "unknown-key",
                     .what = "bad configuration",
                     .where = where,
                     .why = fmt::format("unknown key '{}' for module '{}'", printable(name), printable(pattern)),
                     .fix = suggest(name, known),
                     .status = ExitStatus::usage});
      if (!value.is_null()) check_value(*found, value, where);
    }
  }
}

void check_object(OrderedJson& object, const std::string& prefix, const std::string& where);

/// One configuration for each engine, laid over the whole.
void check_engines(OrderedJson& engines, std::string_view path, const std::string& where) {
  if (!engines.is_object()) bad_value(where, path, engines, "is no mapping of engines to configurations");
  for (const auto& [engine, section] : engines.items()) {
    const std::string at = fmt::format("{}.{}", path, engine);
    if (section.is_null()) continue;
    if (!section.is_object()) bad_value(where, at, section, "is no section of keys");
    check_object(section, "", fmt::format("{} ({})", where, printable(at)));
  }
}

void check_key(const ConfigKey& key, OrderedJson& value, const std::string& where) {
  if (key.type == Type::rules)
    check_rules(value, key.path, where);
  else if (key.type == Type::engines)
    check_engines(value, key.path, where);
  else
    check_value(key, value, where);
}

/// What a name at `prefix` is: a key of its own, or the beginning of others.
struct Named {
  const ConfigKey* key = nullptr;
  const ConfigKey* short_form = nullptr;
  bool is_section = false;
  std::vector<std::string> siblings{};
};
Named find_key(const std::string& prefix, const std::string& path) {
  Named found;
  for (const ConfigKey& key : config_keys()) {
    if (key.path == path) found.key = &key;
    const bool below = key.path.starts_with(path + ".");
    found.is_section = found.is_section || below;
    if (below && key.short_form) found.short_form = &key;
    if (!prefix.empty() && !key.path.starts_with(prefix + ".")) continue;
    const std::string_view rest = key.path.substr(prefix.empty() ? 0 : prefix.size() + 1);
    found.siblings.emplace_back(rest.substr(0, rest.find('.')));
  }
  found.siblings.erase(std::unique(found.siblings.begin(), found.siblings.end()), found.siblings.end());
  return found;
}

void check_object(OrderedJson& object, const std::string& prefix, const std::string& where) {
  for (const auto& [name, value] : object.items()) {
    const std::string path = prefix.empty() ? name : prefix + "." + name;
    const Named found = find_key(prefix, path);
    if ((found.key != nullptr || found.is_section) && value.is_null()) continue;  // as if it were not there
    if (found.key != nullptr) {
      check_key(*found.key, value, where);
    } else if (found.is_section && value.is_object()) {
      check_object(value, path, where);
    } else if (found.short_form != nullptr && !value.is_structured()) {
      check_value(*found.short_form, value, where);
      value = {{std::string(last_name(found.short_form->path)), value}};
    } else if (found.is_section) {
      bad_value(where, path, value, "is no section of keys");
    } else {
      throw Error({.code = "unknown-key",
                   .what = "bad configuration",
                   .where = where,
                   .why = fmt::format("unknown key '{}'", printable(path)),
                   .fix = suggest(name, found.siblings),
                   .status = ExitStatus::usage});
    }
  }
}

}  // namespace

std::span<const ConfigKey> config_keys() {
  static const std::vector<ConfigKey> keys = make_keys();
  return keys;
}

std::string option_of(const ConfigKey& key) {
  if (!key.option.empty()) return std::string(key.option);
  const bool typed = key.type != Type::rules && key.type != Type::integers;
  if (!typed || key.path.find('.') == std::string_view::npos) return {};
  std::string option = "--" + std::string(last_name(key.path));
  std::ranges::replace(option, '_', '-');
  return option;
}

void set_config_value(OrderedJson& config, std::string_view path, const OrderedJson& value) {
  // A module pattern has dots of its own: all that follows layer_configs, but for the setting's name, is one key.
  constexpr std::string_view kRules = "quantization.layer_configs.";
  if (path.starts_with(kRules) && path.size() > kRules.size()) {
    const std::string rest(path.substr(kRules.size()));
    const size_t dot = value.is_object() ? std::string::npos : rest.rfind('.');
    OrderedJson& rules = member(member(config, "quantization", path), "layer_configs", path);
    OrderedJson& rule = member(rules, rest.substr(0, dot), path);
    (dot == std::string::npos ? rule : member(rule, rest.substr(dot + 1), path)) = value;
    return;
  }
  OrderedJson* at = &config;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t dot = std::min(path.find('.', begin), path.size());
    at = &member(*at, std::string(path.substr(begin, dot - begin)), path);
    begin = dot + 1;
  }
  *at = value;
}

void check_config(OrderedJson& config, const std::string& where) { check_object(config, "", where); }

std::vector<std::string> plan_only_keys(const OrderedJson& config) {
  std::vector<std::string> keys;
  for (const ConfigKey& key : config_keys())
    if (key.plan_only && key.path.starts_with("quantization.") && find_config(config, key.path) != nullptr)
      keys.emplace_back(key.path);
  return keys;
}

const OrderedJson* find_config(const OrderedJson& config, std::string_view path) {
  const OrderedJson* at = &config;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t dot = std::min(path.find('.', begin), path.size());
    if (!at->is_object()) return nullptr;
    const auto found = at->find(std::string(path.substr(begin, dot - begin)));
    if (found == at->end()) return nullptr;
    at = &*found;
    begin = dot + 1;
  }
  return at->is_null() ? nullptr : at;
}

}  // namespace bitwright
