#include "train/plan.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "base/nearest.hpp"
#include "engine/backends.hpp"
#include "train/linear.hpp"

namespace bitwright {
namespace {

[[noreturn]] void bad_config(const std::string& why, const std::string& fix = {}) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = "QuantizationConfig",
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

const AdapterMethod& method_named(const std::string& name) {
  static const std::vector<AdapterMethod> methods = adapter_methods();
  const auto found = std::ranges::find(methods, name, &AdapterMethod::name);
  if (found != methods.end()) return *found;
  std::vector<std::string> known;
  for (const AdapterMethod& method : methods) known.emplace_back(method.name);
  bad_config(fmt::format("method '{}' is not known", printable(name)), suggest(name, known));
}

template <class T>
void take(const OrderedJson& json, const char* key, T& value) {
  if (json.contains(key) && !json[key].is_null()) json[key].get_to(value);
}

}  // namespace

OrderedJson to_json(const QuantizationConfig& c) {
  OrderedJson json = {{"method", c.method}};
  if (c.bits != 0) json["bits"] = c.bits;
  json.update(OrderedJson{{"group_size", c.group_size},
                          {"compute_dtype", c.compute_dtype},
                          {"storage_dtype", c.storage_dtype},
                          {"double_quant", c.double_quant},
                          {"quant_type", c.quant_type},
                          {"skip_modules", c.skip_modules},
                          {"layer_configs", c.layer_configs},
                          {"backend_options", c.backend_options}});
  return json;
}

QuantizationConfig quantization_config_from_json(const OrderedJson& json) {
  if (!json.is_object()) bad_config("it is no mapping");
  for (const Diagnostic& issue : validate_quantization_config(json, "cpu"))
    if (issue.code == "UNKNOWN_KEY" || issue.code == "INVALID_VALUE")
      bad_config(issue.message, issue.instead.empty() ? "" : issue.instead.front());
  QuantizationConfig c;
  take(json, "method", c.method);
  take(json, "bits", c.bits);
  take(json, "group_size", c.group_size);
  take(json, "compute_dtype", c.compute_dtype);
  take(json, "storage_dtype", c.storage_dtype);
  take(json, "double_quant", c.double_quant);
  take(json, "quant_type", c.quant_type);
  take(json, "skip_modules", c.skip_modules);
  take(json, "layer_configs", c.layer_configs);
  take(json, "backend_options", c.backend_options);
  return c;
}

}  // namespace bitwright

namespace bitwright::train {
namespace {

/// What a method of a library means in the words of a recipe. What its format leaves no choice in is left open: the
/// container's table fills it in.
QuantizationSettings settings_of(const AdapterMethod& method, const QuantizationConfig& c) {
  QuantizationSettings s;
  if (method.name == "none") {
    s.method = "none";
    return s;
  }
  s.bits = method.bits != 0 ? method.bits : c.bits != 0 ? c.bits : 4;
  if (c.bits != 0 && *s.bits != c.bits) bad_config(fmt::format("{} has {} bits, not {}", method.name, *s.bits, c.bits));
  s.quant_type = "int";
  if (method.name == "bnb_nf4") {
    s.quant_type = c.quant_type;
    s.nested_scales = c.double_quant;
  }
  if (method.name == "bnb_nf4" || method.library == "hqq" || method.library == "mlx") s.group_size = c.group_size;
  return s;
}

/// Layers of one model are of one library: its file could not be read otherwise.
LayerRule rule_of(const QuantizationConfig& whole, const std::string& pattern, const OrderedJson& given) {
  const AdapterMethod& own = method_named(whole.method);
  if (!given.is_object()) bad_config(fmt::format("layer_configs '{}' is no mapping", printable(pattern)));
  constexpr std::array<std::string_view, 5> kKeys = {"method", "bits", "group_size", "quant_type", "double_quant"};
  for (const auto& [key, value] : given.items())
    if (std::ranges::find(kKeys, key) == kKeys.end())
      bad_config(fmt::format("layer_configs '{}': there is no '{}'", printable(pattern), printable(key)),
                 suggest(key, std::vector<std::string>(kKeys.begin(), kKeys.end())));
  try {
    QuantizationConfig c = whole;
    take(given, "method", c.method);
    take(given, "group_size", c.group_size);
    take(given, "quant_type", c.quant_type);
    take(given, "double_quant", c.double_quant);
    AdapterMethod method = method_named(c.method);
    if (method.library != own.library && method.name != "none")
      bad_config(fmt::format("layer_configs '{}': {} is not of {}, as {} is", printable(pattern), method.name,
                             own.library, own.name));
    // "bits" alone stays with the library: 8 bits in a model of mlx_int4.
    if (given.contains("bits")) c.bits = given["bits"].get<int64_t>();
    if (!given.contains("method") && method.bits != 0 && c.bits != 0) method.bits = static_cast<int>(c.bits);
    return {.pattern = pattern, .settings = settings_of(method, c)};
  } catch (const Json::exception& error) {
    bad_config(fmt::format("layer_configs '{}': {}", printable(pattern), error.what()));
  }
}

TensorFacts facts_of(const std::string& path, const torch::nn::LinearImpl& layer) {
  const DType dtype = dtype_of(layer.weight.scalar_type());
  return {.name = path + ".weight",  // of a module that is one layer, too: patterns and rules see a module's weight
          .shape = layer.weight.sizes().vec(),
          .is_float = torch::isFloatingType(layer.weight.scalar_type()),
          .bytes = size_bytes(dtype),
          .dtype = dtype};
}

/// What the container cannot hold stays in floats.
void check_fits(LayerPlan& layer, const TensorFacts& facts, const Container& container, ModulePlan& plan) {
  const Fit fit = container.fit(*layer.plan.scheme, facts.shape);
  if (fit.verdict != Verdict::impossible) return;
  layer.plan = {.name = layer.plan.name, .reason = fit.reason};
  plan.warnings.push_back(
      {"KEPT_IN_FLOATS", fmt::format("{} {} stays in floats: {}", layer.path, to_string(facts.shape), fit.reason)});
}

/// What one file of the container cannot hold together is refused now, not when the model is saved.
void check_fit_together(const ModulePlan& plan, const Container& container) {
  if (container.fit_model == nullptr) return;
  std::vector<StoredTensor> stored;
  for (const LayerPlan& layer : plan.layers)
    if (layer.plan.scheme)
      stored.push_back({.name = layer.plan.name,
                        .shape = layer.layer->weight.sizes().vec(),
                        .scheme = *layer.plan.scheme,
                        .value_dtype = dtype_of(layer.layer->weight.scalar_type()),
                        .linear = layer.plan.linear});
  const Fit fit = container.fit_model(stored);
  if (fit.verdict == Verdict::impossible)
    throw Error({.code = "does-not-fit",
                 .what = "cannot quantize",
                 .where = std::string(container.name),
                 .why = fit.reason,
                 .status = ExitStatus::usage});
}

}  // namespace

std::string weight_name(const std::string& path) { return path.empty() ? "weight" : path + ".weight"; }

DType dtype_of(torch::ScalarType type) {
  if (type == torch::kHalf) return DType::f16;
  return type == torch::kBFloat16 ? DType::bf16 : DType::f32;
}

torch::ScalarType scalar_type_of(DType dtype) {
  if (dtype == DType::f16) return torch::kHalf;
  return dtype == DType::bf16 ? torch::kBFloat16 : torch::kFloat;
}

ModulePlan plan_module(const torch::nn::Module& module, const QuantizationRequest& request,
                       const Container* container) {
  ModulePlan plan;
  std::vector<TensorFacts> facts;
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    facts.push_back(facts_of(path, layer));
    plan.layers.push_back({.path = path, .layer = &layer, .plan = {.name = facts.back().name}});
  });
  if (request.settings.method == "none" && request.rules.empty()) {
    for (LayerPlan& layer : plan.layers) layer.plan.reason = "method none";
    plan.settings = {{"method", "none"}};
    return plan;
  }
  Recipe recipe = resolve(request, facts, container);
  plan.settings = std::move(recipe.settings);
  plan.warnings = std::move(recipe.warnings);
  bool any = false;
  for (size_t i = 0; i < facts.size(); ++i) {
    plan.layers[i].plan = std::move(recipe.tensors[i]);
    if (container != nullptr && plan.layers[i].plan.scheme) check_fits(plan.layers[i], facts[i], *container, plan);
    any = any || plan.layers[i].plan.scheme;
  }
  if (!any)
    throw Error({.code = "nothing-to-quantize",
                 .what = "nothing to quantize",
                 .why = plan.warnings.empty() ? "every layer is skipped" : plan.warnings.front().message,
                 .status = ExitStatus::usage});
  if (container != nullptr) check_fit_together(plan, *container);
  return plan;
}

ContainerRequest request_of(const QuantizationConfig& config) {
  const AdapterMethod& method = method_named(config.method);
  ContainerRequest out;
  out.container = method.container.empty() ? nullptr : find_container(method.container);
  out.request.settings = settings_of(method, config);
  out.request.skip_modules = config.skip_modules;
  out.request.skips_given = true;
  for (const auto& [pattern, given] : config.layer_configs.items())
    out.request.rules.push_back(rule_of(config, pattern, given));
  return out;
}

QuantizedTensor quantize_weight(const TensorPlan& plan, const torch::Tensor& weight) {
  const torch::NoGradGuard no_gradients;
  const DType dtype = dtype_of(weight.scalar_type());
  const torch::Tensor floats = weight.detach().to(torch::kCPU, scalar_type_of(dtype)).contiguous();
  const WeightView view = {.dtype = dtype,
                           .bytes = {static_cast<const std::byte*>(floats.data_ptr()), floats.nbytes()}};
  return plan.algorithm->quantize(*plan.scheme, weight.sizes().vec(), view, plan.options);
}

}  // namespace bitwright::train
