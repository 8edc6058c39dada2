#include "engine/precision.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "base/nearest.hpp"
#include "engine/condition.hpp"
#include "engine/parameters.hpp"

namespace bitwright {
namespace {

[[noreturn]] void bad(const std::string& where, const std::string& why, const std::string& fix = {}) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = where,
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

bool is_field(std::string_view key) { return std::ranges::find(field_names(), key) != field_names().end(); }

void check_field(const std::string& field, const OrderedJson& value) {
  const std::string shown = value.is_string() ? value.get<std::string>() : value.dump();
  const std::vector<std::string>& valid = field_values(field);
  if (!value.is_string() || std::ranges::find(valid, shown) == valid.end())
    bad("quant_config." + field, fmt::format("'{}' is none of its values", printable(shown)),
        fmt::format("valid: {}", fmt::join(valid, ", ")));
}

std::string preset_name(const OrderedJson& value, const Facts& facts) {
  if (!value.is_string()) bad("quant_config.preset", "a preset is named by text");
  return facts.get("presets", value.get<std::string>())["name"].get<std::string>();
}

/// `over` laid over `under`, objects by their members.
void merge_into(OrderedJson& under, const OrderedJson& over) {
  if (!under.is_object() || !over.is_object()) {
    under = over;
    return;
  }
  for (const auto& [key, value] : over.items()) merge_into(under[key], value);
}

void add_parameters(const OrderedJson& parameters, PlanRequest& request) {
  if (parameters.is_null()) return;
  if (!parameters.is_object()) bad("parameters", "names with values are needed");
  for (const auto& [name, value] : parameters.items()) {
    if (value.is_array() && value.empty()) continue;
    request.parameters.emplace_back(name, Json::parse((value.is_array() ? value[0] : value).dump()));
  }
}

PlanRequest request_for(std::string_view engine, const DetectedQuantization& quantization, const Target& target) {
  PlanRequest request{.engine = std::string(engine), .version = target.version};
  request.hardware = target.hardware;
  request.checkpoint = quantization.method;
  request.model = quantization.facts;
  request.model.update(target.model);
  return request;
}

}  // namespace

void validate_quant_config(const OrderedJson& quant_config, const Facts& facts) {
  if (quant_config.is_null()) return;
  if (!quant_config.is_object()) bad("quant_config", "it is a preset, presets or fields");
  const auto is_given = [&](const char* key) {
    const auto found = quant_config.find(key);
    return found != quant_config.end() && !found->empty();
  };
  if (is_given("preset") && is_given("presets"))
    bad("quant_config", "both 'preset' and 'presets' are given", "give one of them");
  for (const auto& [key, value] : quant_config.items()) {
    if (is_field(key)) {
      check_field(key, value);
    } else if (key == "preset") {
      if (!value.is_null()) preset_name(value, facts);
    } else if (key == "presets") {
      if (!value.is_array() && !value.is_string()) bad("quant_config.presets", "a list of names is needed");
      for (const OrderedJson& one : value.is_array() ? value : OrderedJson::array({value})) preset_name(one, facts);
    } else {
      std::vector<std::string> known = field_names();
      known.insert(known.end(), {"preset", "presets"});
      throw Error({.code = "unknown-key",
                   .what = "bad configuration",
                   .where = "quant_config." + printable(key),
                   .why = "there is no such key",
                   .fix = suggest(key, known),
                   .status = ExitStatus::usage});
    }
  }
}

PrecisionFields expand_preset(std::string_view preset, const Facts& facts) {
  const Json& row = facts.get("presets", preset);
  PrecisionFields fields;
  for (const std::string& name : field_names()) {
    fields[name] = row.value(name, "auto");
    check_field(name, fields[name]);
  }
  return fields;
}

std::vector<OrderedJson> expand_quantization_presets(const OrderedJson& quant_config, const Facts& facts) {
  validate_quant_config(quant_config, facts);
  const auto presets = quant_config.is_object() ? quant_config.find("presets") : quant_config.end();
  if (presets == quant_config.end() || presets->empty()) {
    OrderedJson alone = quant_config;
    if (alone.is_object()) alone.erase("presets");
    return {alone};
  }
  std::vector<OrderedJson> expanded;
  for (const OrderedJson& preset : presets->is_array() ? *presets : OrderedJson::array({*presets})) {
    OrderedJson one = {{"preset", preset}};
    for (const auto& [key, value] : quant_config.items())
      if (key != "presets" && key != "preset") one[key] = value;
    expanded.push_back(std::move(one));
  }
  return expanded;
}

PrecisionFields resolve_fields(const OrderedJson& quant_config, const Facts& facts) {
  const std::vector<OrderedJson> expanded = expand_quantization_presets(quant_config, facts);
  if (expanded.size() > 1)
    bad("quant_config.presets",
        fmt::format("{} presets make {} plans, one is needed here", expanded.size(), expanded.size()),
        "give one preset");
  const OrderedJson& one = expanded.front();
  PrecisionFields fields;
  if (!one.is_object()) return fields;
  if (const auto preset = one.find("preset"); preset != one.end() && !preset->is_null())
    fields = expand_preset(preset->get<std::string>(), facts);
  for (const auto& [key, value] : one.items())
    if (is_field(key)) fields[key] = value.get<std::string>();
  std::erase_if(fields, [](const auto& field) { return field.second == "auto"; });
  return fields;
}

std::string field_origin(const OrderedJson& quant_config, std::string_view field, const Facts& facts) {
  const PrecisionFields fields = resolve_fields(quant_config, facts);
  if (const auto found = fields.find(std::string(field)); found == fields.end() || found->second == "auto") return {};
  if (quant_config.contains(field)) return "quant_config";
  return fmt::format("preset {}", quant_config.value("preset", ""));
}

bool should_apply_dynamic_fp8(const OrderedJson& quant_config, const DetectedQuantization& model_quantization,
                              const Facts& facts) {
  const PrecisionFields fields = resolve_fields(quant_config, facts);
  const auto gemm = fields.find("gemm_dtype");
  return gemm != fields.end() && gemm->second == "fp8" && model_quantization.method.empty();
}

std::string get_quant_config_summary(const OrderedJson& quant_config) {
  if (!quant_config.is_object() || quant_config.empty()) return "No quantization";
  std::vector<std::string> presets;
  for (const char* key : {"preset", "presets"})
    if (const auto found = quant_config.find(key); found != quant_config.end()) {
      if (found->is_string()) presets.push_back(found->get<std::string>());
      if (found->is_array())
        for (const OrderedJson& one : *found) presets.push_back(one.is_string() ? one.get<std::string>() : one.dump());
    }
  constexpr std::array<std::array<const char*, 2>, 4> kShown = {
      {{"gemm_dtype", "GEMM"}, {"kvcache_dtype", "KV Cache"}, {"attention_dtype", "Attention"}, {"moe_dtype", "MoE"}}};
  std::vector<std::string> parts;
  for (const auto& [key, shown] : kShown) {
    const auto found = quant_config.find(key);
    if (found != quant_config.end() || presets.empty())
      parts.push_back(fmt::format(
          "{}: {}", shown,
          found != quant_config.end() ? (found->is_string() ? found->get<std::string>() : found->dump()) : "auto"));
  }
  std::string line =
      presets.empty() ? "" : fmt::format("Preset{}: {}", presets.size() > 1 ? "s" : "", fmt::join(presets, ", "));
  if (!parts.empty()) line += fmt::format("{}{}", line.empty() ? "" : "; ", fmt::join(parts, ", "));
  return line;
}

OrderedJson merge_parameters(const OrderedJson& derived, const OrderedJson& given) {
  OrderedJson merged = OrderedJson::object();
  const auto put = [&](const std::string& name, const OrderedJson& value) {
    const std::string plain = plain_flag(name);
    for (auto& [flag, old] : merged.items())
      if (plain_flag(flag) == plain) {
        old = value;
        return;
      }
    merged[name.starts_with('-') ? name : "--" + name] = value;
  };
  const auto put_all = [&](const OrderedJson& parameters) {
    for (const auto& [name, value] : parameters.items()) {
      if (value.is_null() || (value.is_array() && value.empty())) continue;
      const OrderedJson& one = value.is_array() ? value[0] : value;
      put(name, one.is_boolean() || one.is_string() ? one : OrderedJson(one.dump()));
    }
  };
  put_all(derived);
  put_all(given);
  return merged;
}

EnginePlan get_runtime_args(std::string_view runtime, const OrderedJson& quant_config,
                            const OrderedJson& user_parameters, const DetectedQuantization& model_quantization,
                            const Target& target, const Facts& facts) {
  PlanRequest request = request_for(runtime, model_quantization, target);
  request.fields = resolve_fields(quant_config, facts);
  add_parameters(user_parameters, request);
  return plan_engine(request, facts);
}
EnginePlan map_to_vllm_args(const OrderedJson& quant_config, const OrderedJson& user_parameters,
                            const DetectedQuantization& model_quantization, const Target& target) {
  return get_runtime_args("vllm", quant_config, user_parameters, model_quantization, target);
}
EnginePlan map_to_sglang_args(const OrderedJson& quant_config, const OrderedJson& user_parameters,
                              const DetectedQuantization& model_quantization, const Target& target) {
  return get_runtime_args("sglang", quant_config, user_parameters, model_quantization, target);
}
EnginePlan map_to_tensorrt_llm_args(const OrderedJson& quant_config, const OrderedJson& user_parameters,
                                    const DetectedQuantization& model_quantization, const Target& target) {
  return get_runtime_args("tensorrt_llm", quant_config, user_parameters, model_quantization, target);
}

std::vector<Experiment> prepare_experiment_parameters(const OrderedJson& quant_config, const OrderedJson& parameters,
                                                      size_t most, const Facts& facts) {
  std::vector<Experiment> grid;
  for (const OrderedJson& one : expand_quantization_presets(quant_config, facts))
    grid.push_back({.quant_config = one, .parameters = OrderedJson::object()});
  if (!parameters.is_null() && !parameters.is_object()) bad("parameters", "names with values are needed");
  for (const auto& [name, value] : parameters.items()) {
    if (value.is_array() && value.empty()) continue;
    const OrderedJson choices = value.is_array() ? value : OrderedJson::array({value});
    if (grid.size() > most / choices.size())
      throw Error({.code = "too-many-experiments",
                   .what = "cannot make the grid",
                   .where = "parameters." + printable(name),
                   .why = fmt::format("{} times {} experiments are more than {}", grid.size(), choices.size(), most),
                   .fix = "shorten the lists",
                   .status = ExitStatus::usage});
    std::vector<Experiment> wider;
    for (const Experiment& experiment : grid)
      for (const OrderedJson& choice : choices) {
        wider.push_back(experiment);
        wider.back().parameters[name] = choice;
      }
    grid = std::move(wider);
  }
  return grid;
}

int bits_of(std::string_view method) {
  const size_t digit = method.find_first_of("0123456789");
  return digit == std::string_view::npos ? 0 : method[digit] - '0';
}

Intent intent_of(const OrderedJson& quantization) {
  Intent intent;
  if (!quantization.is_object()) return intent;
  const auto text = [&](const char* key, std::string& out) {
    if (const auto found = quantization.find(key); found != quantization.end() && found->is_string())
      out = found->get<std::string>();
  };
  text("method", intent.method);
  text("backend_method", intent.backend_method);
  if (const auto found = quantization.find("weight_only"); found != quantization.end() && found->is_boolean())
    intent.weight_only = found->get<bool>();
  // what older configurations said
  const auto is_true = [&](const char* key) { return quantization.value(key, false); };
  if (!quantization.contains("method") && (is_true("load_in_4bit") || is_true("load_in_8bit")))
    intent.method = is_true("load_in_4bit") ? "int4" : "int8";
  return intent;
}

namespace {

/// Which presets are meant is one choice under two names: the section's stands alone.
void drop_other_presets(OrderedJson& own, const OrderedJson& section) {
  const auto theirs = section.find("quant_config");
  const auto ours = own.find("quant_config");
  if (theirs == section.end() || ours == own.end() || !theirs->is_object() || !ours->is_object()) return;
  if (!theirs->value("preset", OrderedJson()).is_null()) ours->erase("presets");
  if (!theirs->value("presets", OrderedJson()).is_null()) ours->erase("preset");
}

}  // namespace

OrderedJson settings_of_engine(const OrderedJson& config, std::string_view engine, const Facts& facts) {
  OrderedJson own = config.is_object() ? config : OrderedJson::object();
  own.erase("engines");
  const Json* const row = &facts.get("engines", engine);
  // the version that the configuration names is its main engine's
  if (const auto main = own.find("engine"); main != own.end() && main->is_object() && main->contains("name"))
    if (const OrderedJson& name = (*main)["name"];
        name.is_string() && facts.find("engines", name.get<std::string>()) != row)
      main->clear();
  const auto sections = config.is_object() ? config.find("engines") : config.end();
  if (sections == config.end() || sections->is_null()) return own;
  if (!sections->is_object()) bad("engines", "it holds a section for each engine's name");
  for (const auto& [name, section] : sections->items())
    if (&facts.get("engines", name) == row && section.is_object()) {
      drop_other_presets(own, section);
      merge_into(own, section);
    }
  return own;
}

EnginePlan to_backend_params(const OrderedJson& config, std::string_view engine,
                             const DetectedQuantization& model_quantization, const Target& target, const Facts& facts) {
  const OrderedJson own = settings_of_engine(config, engine, facts);
  PlanRequest request = request_for(engine, model_quantization, target);
  if (const auto block = own.find("quantization"); block != own.end()) request.intent = intent_of(*block);
  if (const auto block = own.find("quant_config"); block != own.end()) request.fields = resolve_fields(*block, facts);
  if (const auto block = own.find("parameters"); block != own.end()) add_parameters(*block, request);
  if (const auto name = own.find("hardware"); name != own.end() && name->is_string() && request.hardware.empty())
    request.hardware = facts.get("hardware", name->get<std::string>());
  if (const auto named = own.find("engine"); named != own.end() && named->is_object() && request.version.empty())
    if (facts.find("engines", named->value("name", std::string(engine))) == &facts.get("engines", engine))
      request.version = named->value("version", "");
  return plan_engine(request, facts);
}

}  // namespace bitwright
