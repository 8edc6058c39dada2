#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "base/mapped_file.hpp"
#include "base/nearest.hpp"
#include "cli/command.hpp"
#include "engine/adapt.hpp"
#include "engine/detect.hpp"
#include "engine/memory.hpp"
#include "engine/precision.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void usage(const std::string& where, const std::string& why, const std::string& fix = {}) {
  throw Error({.code = "bad-value",
               .what = "bad command line",
               .where = where,
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

/// "8GiB", "500MB", "1.5e9": bytes.
double parse_bytes(const std::string& option, const std::string& text) {
  struct Unit {
    std::string_view name;
    double bytes;
  };
  constexpr std::array<Unit, 10> kUnits = {{{"", 1},
                                            {"B", 1},
                                            {"kB", 1e3},
                                            {"KB", 1e3},
                                            {"MB", 1e6},
                                            {"GB", 1e9},
                                            {"TB", 1e12},
                                            {"KiB", 1024.0},
                                            {"MiB", 1048576.0},
                                            {"GiB", 1073741824.0}}};
  size_t used = 0;
  double number = 0;
  try {
    number = std::stod(text, &used);
  } catch (const std::exception&) {
    usage(option, fmt::format("'{}' is no size", printable(text)), "for example 80GiB");
  }
  while (used < text.size() && text[used] == ' ') ++used;
  const auto* unit = std::ranges::find(kUnits, std::string_view(text).substr(used), &Unit::name);
  if (unit == kUnits.end() || !std::isfinite(number) || number < 0)
    usage(option, fmt::format("'{}' is no size", printable(text)), "for example 80GiB");
  return number * unit->bytes;
}

/// What can be said of a model without reading its weights.
struct Model {
  ModelDocuments documents;
  DetectedQuantization quantization;
  Json facts = Json::object();
  double weight_bytes = 0;
};

void read_directory(const fs::path& path, Model& model) {
  constexpr uintmax_t kLargest = 64U << 20;  // an index of many shards; nothing else here is near it
  for (const auto& entry : fs::directory_iterator(path)) {
    if (!entry.is_regular_file()) continue;
    const std::string name = entry.path().filename().string();
    const std::string suffix = entry.path().extension().string();
    if (suffix == ".safetensors" || suffix == ".gguf" || suffix == ".npz")
      model.weight_bytes += static_cast<double>(entry.file_size());
    const bool says = name.ends_with("config.json") || name == "quant_model_description.json" ||
                      name == "quantization_metadata.json" || name == "quanto_qmap.json";
    if (says && entry.file_size() <= kLargest)
      model.documents[name] = parse_json(read_text_file(entry.path()), entry.path().string());
  }
}

Model read_model(const std::string& name) {
  Model model;
  const fs::path path = name;
  if (fs::is_directory(path)) {
    read_directory(path, model);
    if (model.documents.empty())
      throw Error(
          {.code = "no-model", .what = "cannot plan", .where = name, .why = "the directory has no config.json"});
  } else {
    const MappedFile file(path);
    model.weight_bytes = static_cast<double>(file.bytes().size());
    if (file.text().starts_with("GGUF")) model.quantization = {.method = "gguf", .evidence = "the file's first bytes"};
    if (const fs::path config = path.parent_path() / "config.json";
        fs::is_regular_file(config) && model.quantization.method.empty())
      model.documents["config.json"] = parse_json(read_text_file(config), config.string());
  }
  if (const auto config = model.documents.find("config.json"); config != model.documents.end())
    model.facts = model_facts(config->second);
  if (model.quantization.method.empty())
    model.quantization = detect_model_quantization(model.documents, path.filename().string());
  model.facts.update(model.quantization.facts);
  return model;
}

/// The device this runs on: an NVIDIA GPU by the name its driver gives, or the processor.
Json local_hardware(std::vector<Warning>& warnings) {
  std::error_code ignored;
  for (const auto& gpu : fs::directory_iterator("/proc/driver/nvidia/gpus", ignored)) {
    std::ifstream file(gpu.path() / "information");
    for (std::string line; std::getline(file, line);) {
      if (!line.starts_with("Model:")) continue;
      std::string name = line.substr(std::min(line.find_first_not_of(" \t", 6), line.size()));
      for (const std::string_view word : {"NVIDIA ", "GeForce ", " HBM3", " 80GB", " Laptop GPU"})
        if (const size_t at = name.find(word); at != std::string::npos) name.erase(at, word.size());
      if (const Json* known = Facts::standard().find("hardware", name)) return *known;
      warnings.push_back({"UNKNOWN_HARDWARE",
                          fmt::format("no facts about '{}'; say --hardware, or add it as a file", printable(name))});
      return {{"name", name}, {"vendor", "nvidia"}};
    }
  }
  return *Facts::standard().find("hardware", "cpu");
}

[[noreturn]] void unknown_key(const std::string& where, const std::string& path, std::string_view name,
                              const std::vector<std::string>& known) {
  throw Error({.code = "unknown-key",
               .what = "bad configuration",
               .where = where,
               .why = fmt::format("unknown key '{}'", printable(path)),
               .fix = suggest(name, known),
               .status = ExitStatus::usage});
}

/// Every key of a configuration must be one that INTERFACES names, those of an engine's own section too.
void check_keys(const OrderedJson& config, const std::string& where) {
  static const std::vector<std::string> kKeys = {"model",   "quantization", "quant_config", "engine",
                                                 "engines", "hardware",     "parameters"};
  static const std::vector<std::string> kQuantization = {
      "method",        "weight_only",  "mode",          "backend_method", "algorithm", "range",        "scheme",
      "compute_dtype", "skip_modules", "layer_configs", "calibration",    "budget",    "load_in_4bit", "load_in_8bit"};
  if (!config.is_object()) usage(where, "it holds no mapping of keys");
  for (const auto& [key, value] : config.items()) {
    if (std::ranges::find(kKeys, key) == kKeys.end()) unknown_key(where, key, key, kKeys);
    if (key == "quantization" && value.is_object())
      for (const auto& [inner, setting] : value.items())
        if (std::ranges::find(kQuantization, inner) == kQuantization.end())
          unknown_key(where, "quantization." + inner, inner, kQuantization);
    if (const OrderedJson* weight_only = find_config(config, "quantization.weight_only");
        weight_only != nullptr && !weight_only->is_boolean())
      usage(where, "quantization.weight_only is neither true nor false");
    if (key == "engines" && value.is_object())
      for (const auto& [engine, section] : value.items()) check_keys(section, where);
  }
}

/// The configuration: --config, then the options, which win.
OrderedJson read_configuration(const Arguments& arguments) {
  OrderedJson config = OrderedJson::object();
  if (const auto file = arguments.text("--config")) {
    config = read_config_file(*file);
    check_keys(config, *file);
  }
  constexpr std::array<std::array<const char*, 2>, 9> kOptions = {
      {{"--engine", "engine.name"},
       {"--engine-version", "engine.version"},
       {"--preset", "quant_config.preset"},
       {"--gemm-dtype", "quant_config.gemm_dtype"},
       {"--kvcache-dtype", "quant_config.kvcache_dtype"},
       {"--attention-dtype", "quant_config.attention_dtype"},
       {"--moe-dtype", "quant_config.moe_dtype"},
       {"--method", "quantization.method"},
       {"--backend-method", "quantization.backend_method"}}};
  if (config.contains("engine") && config["engine"].is_string()) config["engine"] = {{"name", config["engine"]}};
  for (const auto& [option, key] : kOptions)
    if (const auto value = arguments.text(option)) set_config_value(config, key, *value);
  if (const auto value = arguments.text("--weight-only"))
    set_config_value(config, "quantization.weight_only", *value == "true");
  if (const auto value = arguments.text("--hardware")) config["hardware"] = *value;
  if (const auto given = arguments.values.find("--parameter"); given != arguments.values.end())
    for (const std::string& assignment : given->second) {
      const size_t equals = assignment.find('=');
      if (equals == 0) usage("--parameter", fmt::format("'{}' is not NAME or NAME=VALUE", printable(assignment)));
      config["parameters"][assignment.substr(0, equals)] =
          equals == std::string::npos ? OrderedJson(true) : OrderedJson(assignment.substr(equals + 1));
    }
  return config;
}

/// `config` as the engine sees it: what `engines.NAME` says laid over the rest.
OrderedJson for_engine(const OrderedJson& config, const std::string& engine) {
  OrderedJson own = config;
  const Json& row = Facts::standard().get("engines", engine);
  if (const OrderedJson* engines = find_config(config, "engines"); engines != nullptr && engines->is_object())
    for (const auto& [name, section] : engines->items())
      if (&Facts::standard().get("engines", name) == &row) own.merge_patch(section);
  return own;
}

PlanRequest request_of(const OrderedJson& config, const OrderedJson& quant_config, const Model& model,
                       const Json& hardware) {
  const OrderedJson* engine = find_config(config, "engine.name");
  PlanRequest request{.engine = engine != nullptr && engine->is_string() ? engine->get<std::string>() : "native"};
  if (const OrderedJson* version = find_config(config, "engine.version"); version != nullptr && version->is_string())
    request.version = version->get<std::string>();
  request.hardware = hardware;
  request.checkpoint = model.quantization.method;
  request.model = model.facts;
  request.fields = resolve_fields(quant_config);
  if (const OrderedJson* quantization = find_config(config, "quantization")) request.intent = intent_of(*quantization);
  if (const OrderedJson* parameters = find_config(config, "parameters");
      parameters != nullptr && parameters->is_object())
    for (const auto& [name, value] : parameters->items()) {
      if (value.is_array() && value.empty()) continue;
      request.parameters.emplace_back(name, Json::parse((value.is_array() ? value[0] : value).dump()));
    }
  return request;
}

OrderedJson predicted(const Model& model, const EnginePlan& plan, const Deployment& deployment) {
  const MemoryEstimate e = estimate_memory(model.facts, model.weight_bytes, plan, deployment);
  OrderedJson json = {{"weights_bytes", std::llround(e.weights_bytes)},
                      {"kv_cache_bytes", std::llround(e.kv_cache_bytes)},
                      {"activation_bytes", std::llround(e.activation_bytes)},
                      {"overhead_bytes", std::llround(e.overhead_bytes)},
                      {"total_bytes", std::llround(e.total_bytes)},
                      {"context", e.context},
                      {"batch", deployment.batch},
                      {"kv_cache_bytes_per_token", e.kv_bytes_per_token}};
  if (e.fits) {
    json["memory_bytes"] = std::llround(deployment.memory_bytes);
    json["fits"] = *e.fits;
    json["most_context"] = *e.most_context;
    json["most_batch"] = *e.most_batch;
  }
  return json;
}

Deployment deployment_of(const Arguments& arguments, const Json& hardware, const EnginePlan& plan) {
  Deployment deployment;
  deployment.context = arguments.integer("--context").value_or(0);
  deployment.batch = arguments.integer("--batch").value_or(1);
  if (hardware.contains("memory_gib")) deployment.memory_bytes = hardware["memory_gib"].get<double>() * 1073741824.0;
  if (const auto memory = arguments.text("--memory")) deployment.memory_bytes = parse_bytes("--memory", *memory);
  deployment.tensor_parallel = plan.tensor_parallel;
  return deployment;
}

/// Which method leaves the most precision and still fits.
void add_recommendation(const Model& model, const EnginePlan& plan, const Deployment& deployment, OrderedJson& result) {
  if (deployment.memory_bytes <= 0) usage("--recommend", "the memory is unknown", "give --memory or --hardware");
  if (!model.quantization.method.empty())
    usage("--recommend", fmt::format("the model is quantized already ({})", model.quantization.method),
          "start from the 16-bit model");
  OrderedJson& list = result["recommend"] = OrderedJson::array();
  result["recommended"] = nullptr;
  for (const SizedMethod& option : weigh_methods(model.facts, model.weight_bytes, plan, deployment)) {
    list.push_back({{"method", option.method},
                    {"bits", option.bits},
                    {"total_bytes", std::llround(option.estimate.total_bytes)},
                    {"fits", *option.estimate.fits}});
    if (*option.estimate.fits && result["recommended"].is_null()) result["recommended"] = option.method;
  }
}

OrderedJson plan_one(const Arguments& arguments, const OrderedJson& config, const OrderedJson& quant_config,
                     const Model& model, const Json& hardware, std::vector<Warning>& warnings) {
  PlanRequest request = request_of(config, quant_config, model, hardware);
  OrderedJson changes = OrderedJson::array();
  EnginePlan plan = plan_engine(request);
  OrderedJson nearest = OrderedJson::array();
  if (plan.outcome == "error") {
    const bool adapt = arguments.flag("--adapt");
    if (auto adapted = adapt_plan(request)) {
      for (const Change& change : adapted->changes)
        (adapt ? changes : nearest).push_back({{"field", change.field}, {"from", change.from}, {"to", change.to}});
      if (adapt) plan = std::move(adapted->plan);
    }
  }
  OrderedJson engine = plan_json(plan, arguments.model);
  OrderedJson errors = engine["errors"], notes = engine["warnings"];
  engine.erase("errors");
  engine.erase("warnings");
  for (const OrderedJson& warning : notes) warnings.push_back({warning["code"], warning["message"]});
  OrderedJson result = {{"intent", request.intent.method}, {"quant_config", get_quant_config_summary(quant_config)}};
  result["checkpoint"] = {{"method", model.quantization.method},         {"bits", model.quantization.bits},
                          {"group_size", model.quantization.group_size}, {"scheme", model.quantization.scheme},
                          {"evidence", model.quantization.evidence},     {"hint", model.quantization.hint}};
  result["hardware"] = hardware.contains("name") ? OrderedJson(hardware["name"].get<std::string>()) : OrderedJson();
  result["predicted"] = predicted(model, plan, deployment_of(arguments, hardware, plan));
  if (arguments.flag("--recommend")) add_recommendation(model, plan, deployment_of(arguments, hardware, plan), result);
  result["engine"] = std::move(engine);
  if (!changes.empty()) result["changes"] = std::move(changes);
  if (!nearest.empty()) result["nearest"] = std::move(nearest);
  result["explain"] = arguments.flag("--explain");
  result["errors"] = std::move(errors);
  return result;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  OrderedJson config = read_configuration(arguments);
  const Model model = read_model(arguments.model);
  if (!model.quantization.hint.empty())
    warnings.push_back({"NAME_HINT", fmt::format("the name suggests '{}', but no file says so: taken for 16 bits",
                                                 model.quantization.hint)});
  const OrderedJson* engine = find_config(config, "engine.name");
  config = for_engine(config, engine != nullptr && engine->is_string() ? engine->get<std::string>() : "native");
  Json hardware = Json::object();
  if (const OrderedJson* name = find_config(config, "hardware"); name != nullptr && name->is_string())
    hardware =
        *name == "local" ? local_hardware(warnings) : Facts::standard().get("hardware", name->get<std::string>());
  const OrderedJson* quant_config = find_config(config, "quant_config");
  const auto expanded = expand_quantization_presets(quant_config != nullptr ? *quant_config : OrderedJson::object());
  if (expanded.size() == 1) return plan_one(arguments, config, expanded.front(), model, hardware, warnings);
  OrderedJson plans = OrderedJson::array(), errors = OrderedJson::array();
  for (const OrderedJson& one : expanded) {
    plans.push_back(plan_one(arguments, config, one, model, hardware, warnings));
    for (const OrderedJson& error : plans.back()["errors"]) errors.push_back(error);
  }
  return {{"plans", std::move(plans)}, {"errors", std::move(errors)}};
}

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

void print(const OrderedJson& result) {
  if (!result.contains("plans")) return print_one(result);
  for (const OrderedJson& plan : result["plans"]) {
    print_one(plan);
    fmt::print("\n");
  }
}

ExitStatus status(const OrderedJson& result) {
  return result["errors"].empty() ? ExitStatus::done : ExitStatus::failed;
}

Option text(const char* name, const char* value, const char* help) {
  return {.name = name, .type = Option::Type::text, .value_name = value, .help = help};
}
Option field(const char* name, const char* which, const char* help) {
  Option option = text(name, "X", help);
  option.values = field_values(which);
  return option;
}

std::vector<Option> options() {
  Option method = text("--method", "X", "intent: what the weights should be");
  method.values = intent_methods();
  Option weight_only = text("--weight-only", "X", "do activations stay in floating point: true or false");
  weight_only.values = {"true", "false"};
  return {text("-c,--config", "FILE", "configuration, YAML or JSON"),
          text("--engine", "NAME", "engine to plan for (default: native)"),
          text("--engine-version", "X", "its version (default: the one the facts were read from)"),
          text("--hardware", "NAME", "device, as `bitwright hardware` lists them, or local"),
          text("--preset", "NAME", "preset of the four fields"),
          field("--gemm-dtype", "gemm_dtype", "type of matrix products"),
          field("--kvcache-dtype", "kvcache_dtype", "type of the KV cache"),
          field("--attention-dtype", "attention_dtype", "type of attention"),
          field("--moe-dtype", "moe_dtype", "type of experts"),
          method,
          weight_only,
          text("--backend-method", "X", "the engine's own method name"),
          {.name = "--parameter",
           .type = Option::Type::names,
           .value_name = "NAME=VALUE",
           .help = "an argument of the engine's own; always wins; may be repeated"},
          {.name = "--context",
           .type = Option::Type::integer,
           .value_name = "N",
           .help = "tokens of a sequence",
           .least = 1,
           .most = 1 << 30},
          {.name = "--batch",
           .type = Option::Type::integer,
           .value_name = "N",
           .help = "sequences at once",
           .least = 1,
           .most = 1 << 20},
          text("--memory", "SIZE", "memory of the device (default: the profile's)"),
          {.name = "--recommend",
           .type = Option::Type::flag,
           .value_name = "",
           .help = "the method that leaves the most precision and fits the memory"},
          {.name = "--adapt",
           .type = Option::Type::flag,
           .value_name = "",
           .help = "where the engine would refuse, the nearest plan that works"},
          {.name = "--explain",
           .type = Option::Type::flag,
           .value_name = "",
           .help = "the rule and the source of every argument"}};
}

}  // namespace

extern const Command plan_command;
const Command plan_command = {.name = "plan",
                              .summary = "what an engine must be told, and what it will take",
                              .options = options(),
                              .run = run,
                              .print = print,
                              .status = status};

}  // namespace bitwright
