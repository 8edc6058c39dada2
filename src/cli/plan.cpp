#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "base/size.hpp"
#include "cli/command.hpp"
#include "cli/output_options.hpp"
#include "cli/page.hpp"
#include "cli/plan_diff.hpp"
#include "cli/plan_page.hpp"
#include "cli/plan_weights.hpp"
#include "container/container.hpp"
#include "engine/adapt.hpp"
#include "engine/lint.hpp"
#include "engine/memory.hpp"
#include "engine/model_summary.hpp"
#include "engine/parallel.hpp"
#include "engine/precision.hpp"
#include "recipe/config.hpp"

namespace bitwright {

extern const Command plan_command;

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
  Json cpu = *Facts::standard().find("hardware", "cpu");
  cpu["memory_gib"] = static_cast<double>(total_memory()) / 1073741824.0;
  return cpu;
}

PlanRequest request_of(const OrderedJson& config, const OrderedJson& quant_config, const ModelSummary& model,
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

/// Null for what the model's files do not say.
OrderedJson bytes_or_null(double bytes, bool known) { return known ? OrderedJson(std::llround(bytes)) : OrderedJson(); }

/// Do the files say how large weights and KV cache are? Else nothing is said of whether they fit.
bool is_sized(const MemoryEstimate& estimate) { return estimate.weights_bytes > 0 && estimate.kv_cache_bytes > 0; }

OrderedJson predicted(const MemoryEstimate& e, const WeightsPlan& weights, const Deployment& deployment) {
  const int64_t devices = deployment.tensor_parallel * deployment.pipeline_parallel;
  const double bytes =
      weights.file_bytes > 0 ? weights.file_bytes : e.weights_bytes * static_cast<double>(deployment.tensor_parallel);
  OrderedJson json = {{"bytes", bytes_or_null(bytes, bytes > 0)},
                      {"weights_bytes", bytes_or_null(e.weights_bytes, e.weights_bytes > 0)},
                      {"kv_cache_bytes", bytes_or_null(e.kv_cache_bytes, e.kv_cache_bytes > 0)},
                      {"activation_bytes", std::llround(e.activation_bytes)},
                      {"overhead_bytes", std::llround(e.overhead_bytes)},
                      {"total_bytes", bytes_or_null(e.total_bytes, is_sized(e))},
                      {"devices", devices},
                      {"context", e.context},
                      {"batch", deployment.batch},
                      {"kv_cache_bytes_per_token", e.kv_bytes_per_token}};
  if (e.fits && is_sized(e)) {
    json["memory_bytes"] = std::llround(deployment.memory_bytes);
    json["usable_bytes"] = std::llround(e.usable_bytes);
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
  if (const auto memory = arguments.size("--memory")) deployment.memory_bytes = static_cast<double>(*memory);
  deployment.tensor_parallel = plan.tensor_parallel;
  deployment.pipeline_parallel = parallelism_of(plan).pipeline;
  return deployment;
}

/// An engine would start and run out of memory: no refusal that its facts know, and figures are estimates.
void check_memory(const MemoryEstimate& e, const Deployment& deployment, std::vector<Diagnostic>& said) {
  if (e.fits.value_or(true) || !is_sized(e)) return;
  if (std::ranges::find(said, "DOES_NOT_FIT", &Diagnostic::code) != said.end()) return;
  said.push_back(
      {.code = "DOES_NOT_FIT",
       .severity = Severity::warning,
       .message = fmt::format("a device needs {}, and the engine uses {} of its {}", size_text(e.total_bytes),
                              size_text(e.usable_bytes), size_text(deployment.memory_bytes))});
}

/// Which method leaves the most precision and still fits.
void add_recommendation(const ModelSummary& model, const EnginePlan& plan, const Deployment& deployment,
                        OrderedJson& result) {
  if (deployment.memory_bytes <= 0) usage("--recommend", "the memory is unknown", "give --memory or --hardware");
  if (!model.quantization.method.empty())
    usage("--recommend", fmt::format("the model is quantized already ({})", model.quantization.method),
          "start from the 16-bit model");
  if (result["predicted"]["total_bytes"].is_null())
    throw Error({.code = "unknown-size",
                 .what = "cannot recommend a method",
                 .why = "the files say neither how large the weights are nor the sizes of the layers",
                 .fix = "give a model with weights, or a whole config.json"});
  OrderedJson& list = result["recommend"] = OrderedJson::array();
  result["recommended"] = nullptr;
  for (const SizedMethod& option :
       weigh_methods(model.facts, static_cast<double>(model.weight_bytes), plan, deployment)) {
    list.push_back({{"method", option.method},
                    {"bits", option.bits},
                    {"total_bytes", std::llround(option.estimate.total_bytes)},
                    {"fits", *option.estimate.fits}});
    if (*option.estimate.fits && result["recommended"].is_null()) result["recommended"] = option.method;
  }
}

OrderedJson warnings_json(const std::vector<Warning>& warnings) {
  OrderedJson list = OrderedJson::array();
  for (const Warning& warning : warnings) list.push_back({{"code", warning.code}, {"message", warning.message}});
  return list;
}

/// Several plans may have the same to say.
void add_warning(std::vector<Warning>& warnings, Warning warning) {
  const auto same = [&](const Warning& w) { return w.code == warning.code && w.message == warning.message; };
  if (std::ranges::none_of(warnings, same)) warnings.push_back(std::move(warning));
}

OrderedJson plan_one(const Arguments& arguments, const OrderedJson& config, const OrderedJson& quant_config,
                     const ModelSummary& model, const Json& hardware, std::vector<Warning>& warnings) {
  const int64_t devices = arguments.integer("--devices").value_or(0);
  std::vector<Diagnostic> of_devices;
  PlanRequest request = request_of(config, quant_config, model, hardware);
  EnginePlan unshared;
  unshared.engine = request.engine;
  const Deployed deployed = {.modules = model.stored.modules,
                             .weight_bytes = static_cast<double>(model.weight_bytes),
                             .deployment = deployment_of(arguments, hardware, unshared),
                             .devices = devices};
  request = derive_parallel(std::move(request), deployed, of_devices);
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
  std::vector<Warning> said;
  WeightsPlan weights =
      plan_weights(arguments.model, model, config, request, plan, arguments.text("--format").value_or(""), said);
  std::ranges::move(check_parallel(request, plan, devices), std::back_inserter(of_devices));
  const Deployment deployment = deployment_of(arguments, hardware, plan);
  const MemoryEstimate estimate = estimate_memory(model.facts, weights.loaded_bytes, plan, deployment);
  check_memory(estimate, deployment, of_devices);
  add_diagnostics(std::move(of_devices), plan);
  PlanRequest stored = request;
  if (!weights.checkpoint.empty()) stored.checkpoint = weights.checkpoint;
  add_diagnostics(lint_modules(weights.checkpoint.empty() ? model.stored.modules : weights.modules, stored, plan),
                  plan);
  OrderedJson engine = plan_json(plan, weights.command.empty() ? arguments.model : kOutput);
  OrderedJson errors = engine["errors"], notes = engine["warnings"];
  engine.erase("errors");
  engine.erase("warnings");
  for (const OrderedJson& note : notes) said.push_back({note["code"], note["message"]});
  for (OrderedJson& answer : engine["answers"]) {
    const auto field = answer["field"].get<std::string>();
    const bool of_intent = field == "intent" || field == "backend_method";
    answer["from"] = of_intent ? (field == "intent" ? "quantization.method" : "quantization.backend_method")
                               : field_origin(quant_config, field);
    for (const OrderedJson& change : changes)
      if (change["field"] == field || (field == "intent" && change["field"] == "method"))
        answer["from"] = fmt::format("--adapt, in place of {}", change["from"].get<std::string>());
  }
  OrderedJson result = {{"intent", request.intent.method},
                        {"scheme", weights.scheme},
                        {"algorithm", weights.algorithm},
                        {"container", weights.container},
                        {"quantize", weights.command.empty() ? OrderedJson() : OrderedJson(weights.command)},
                        {"quant_config", get_quant_config_summary(quant_config)}};
  result["checkpoint"] = {{"method", model.quantization.method},         {"bits", model.quantization.bits},
                          {"group_size", model.quantization.group_size}, {"scheme", model.quantization.scheme},
                          {"evidence", model.quantization.evidence},     {"hint", model.quantization.hint}};
  result["hardware"] = hardware.contains("name") ? OrderedJson(hardware["name"].get<std::string>()) : OrderedJson();
  result["predicted"] = predicted(estimate, weights, deployment);
  if (arguments.flag("--recommend")) add_recommendation(model, plan, deployment, result);
  result["engine"] = std::move(engine);
  if (!changes.empty()) result["changes"] = std::move(changes);
  if (!nearest.empty()) result["nearest"] = std::move(nearest);
  result["explain"] = arguments.flag("--explain");
  result["errors"] = std::move(errors);
  result["tensors"] = std::move(weights.tensors);
  result["warnings"] = warnings_json(said);
  for (Warning& warning : said) add_warning(warnings, std::move(warning));
  return result;
}

std::string engine_of(const OrderedJson& config) {
  const OrderedJson* engine = find_config(config, "engine.name");
  return engine != nullptr ? engine->get<std::string>() : "native";
}

/// The engine that is named, and those of `engines` unless one was typed.
std::vector<std::string> engines_of(const Arguments& arguments) {
  const OrderedJson* several = find_config(arguments.config, "engines");
  if (several == nullptr || several->empty() || arguments.text("--engine")) return {engine_of(arguments.config)};
  std::vector<std::string> names;
  if (find_config(arguments.config, "engine.name") != nullptr) names.push_back(engine_of(arguments.config));
  for (const auto& [name, section] : several->items()) {
    const Json& engine = Facts::standard().get("engines", name);
    if (std::ranges::none_of(names,
                             [&](const std::string& n) { return &Facts::standard().get("engines", n) == &engine; }))
      names.push_back(name);
  }
  return names;
}

/// A plan for each of the presets.
void plan_engine_of(const Arguments& arguments, const std::string& engine, const ModelSummary& model,
                    OrderedJson& plans, std::vector<Warning>& warnings) {
  OrderedJson config = settings_of_engine(arguments.config, engine);
  config["engine"]["name"] = engine;
  Json hardware = Json::object();
  if (const OrderedJson* name = find_config(config, "hardware"))
    hardware =
        *name == "local" ? local_hardware(warnings) : Facts::standard().get("hardware", name->get<std::string>());
  const OrderedJson* quant_config = find_config(config, "quant_config");
  for (const OrderedJson& one :
       expand_quantization_presets(quant_config != nullptr ? *quant_config : OrderedJson::object()))
    plans.push_back(plan_one(arguments, config, one, model, hardware, warnings));
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  Facts::standard();  // what is wrong with them is no fault of the model's
  const std::vector<std::string> engines = engines_of(arguments);
  const ModelSummary model = summarize_model(arguments.model);
  if (!model.quantization.hint.empty())
    warnings.push_back({"NAME_HINT", fmt::format("the name suggests '{}', but no file says so: taken for 16 bits",
                                                 model.quantization.hint)});
  if (model.unread)
    warnings.push_back({"NO_TENSORS", fmt::format("the weights cannot be listed: {}", model.unread->what())});
  OrderedJson plans = OrderedJson::array(), errors = OrderedJson::array();
  for (const std::string& engine : engines) plan_engine_of(arguments, engine, model, plans, warnings);
  if (plans.size() == 1) return std::move(plans.front());
  for (const OrderedJson& plan : plans)
    for (const OrderedJson& error : plan["errors"]) errors.push_back(error);
  return {{"plans", std::move(plans)}, {"errors", std::move(errors)}};
}

/// The other side of --diff: a plan that was kept, or the plan of the other configuration, everything else as asked.
OrderedJson plan_of_file(const Arguments& arguments, const std::string& file) {
  const std::string text = read_text_file(file);
  if (const size_t first = text.find_first_not_of(" \t\r\n"); first != std::string::npos && text[first] == '{') {
    // a mapping in YAML may begin so as well
    if (OrderedJson::accept(text)) {
      OrderedJson document = parse_ordered_json(text, file);
      if (is_plan(document)) return document;
    }
  }
  Arguments other = arguments;
  other.values["--config"] = {file};
  other.config = read_config(plan_command, other);
  std::vector<Warning> warnings;
  OrderedJson result = run(other, warnings);
  result["warnings"] = warnings_json(warnings);
  return result;
}

OrderedJson run_and_compare(const Arguments& arguments, std::vector<Warning>& warnings) {
  OrderedJson result = run(arguments, warnings);
  if (const auto file = arguments.text("--diff")) {
    result["warnings"] = warnings_json(warnings);
    result["diff"] = diff_plans(plan_of_file(arguments, *file), result);
  }
  return result;
}

void print(const OrderedJson& result) {
  if (result.contains("diff")) return print_diff(result["diff"]);
  print_plan(result);
}

ExitStatus status(const OrderedJson& result) {
  if (result.contains("diff")) return ExitStatus::done;  // what was asked for is the difference
  return result["errors"].empty() ? ExitStatus::done : ExitStatus::failed;
}

std::vector<Option> options() {
  return {{.name = "--format",
           .type = Option::Type::text,
           .value_name = "F",
           .help = "container to quantize into (default: one that the engine loads)",
           .values = writable_formats()},
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
          {.name = "--memory",
           .type = Option::Type::size,
           .value_name = "SIZE",
           .help = "memory of the device (default: the profile's)"},
          {.name = "--devices",
           .type = Option::Type::integer,
           .value_name = "N",
           .help = "devices there are, for --parameter tensor_parallel=auto",
           .least = 1,
           .most = 1 << 16},
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
           .help = "the rule and the source of every argument, and what became of every request"},
          {.name = "--diff",
           .type = Option::Type::text,
           .value_name = "PLAN2",
           .help = "what differs from another plan: its JSON, or another configuration file"}};
}

}  // namespace

const Command plan_command = {.name = "plan",
                              .summary = "what an engine must be told, and what it will take",
                              .takes_config = true,
                              .plans = true,
                              .options = options(),
                              .run = run_and_compare,
                              .print = print,
                              .status = status};

}  // namespace bitwright
