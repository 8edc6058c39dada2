#include "bitwright/torch/ptq.hpp"

#include <algorithm>
#include <array>
#include <map>

#include "base/error.hpp"
#include "bitwright/torch/qat.hpp"
#include "recipe/config.hpp"
#include "train/config_choice.hpp"
#include "train/fake_quantized_linear.hpp"
#include "train/linear.hpp"
#include "train/observer.hpp"
#include "train/quantized_module.hpp"

namespace bitwright {
namespace {

using namespace train;

constexpr const char* kWhere = "PtqConfig";

enum class Inputs : uint8_t { fixed, dynamic, floats };
constexpr std::array<std::pair<std::string_view, Inputs>, 3> kTypes = {
    {{"static", Inputs::fixed}, {"dynamic", Inputs::dynamic}, {"weight_only", Inputs::floats}}};
constexpr std::array<std::pair<std::string_view, RangeEstimate>, 3> kEstimates = {
    {{"minmax", RangeEstimate::minmax},
     {"moving_average", RangeEstimate::moving_average},
     {"percentile", RangeEstimate::percentile}}};

Inputs inputs_of(const PtqConfig& config) { return choose(kWhere, "type", config.type, kTypes); }

const Container* container_of(const PtqConfig& config) {
  const Container* const container = find_container(config.format);
  if (container == nullptr)
    bad_config(kWhere, fmt::format("format: there is no container '{}'", printable(config.format)));
  return container;
}

/// The same words as in a configuration file, so that they are checked and mean the same.
QuantizationRequest request_of(const PtqConfig& c) {
  OrderedJson scheme = {{"bits", c.bits}, {"quant_type", c.quant_type}};
  if (c.granularity) scheme["granularity"] = *c.granularity;
  if (c.group_size) scheme["group_size"] = *c.group_size;
  if (c.symmetric) scheme["symmetric"] = *c.symmetric;
  OrderedJson config = {{"quantization", {{"scheme", scheme}, {"skip_modules", c.skip_modules}}}};
  if (!c.layer_configs.empty()) config["quantization"]["layer_configs"] = c.layer_configs;
  check_config(config, kWhere);
  return read_request(config);
}

/// 8 bits a value: of floats as the weights are, else integers. One scale for all tokens, or one a token.
Scheme input_scheme(const PtqConfig& c) {
  const Grouping grouping = inputs_of(c) == Inputs::fixed ? Grouping::tensor() : Grouping::channel();
  const bool floats = c.quant_type == "e4m3" || c.quant_type == "e5m2";
  if (floats && !c.symmetric_inputs) bad_config(kWhere, "symmetric_inputs: floats have no zero point");
  const ElementType& element = floats ? float_element(DType::f8_e4m3) : integer_element(8, true);
  Scheme scheme = {.element = &element, .scale = parameter(grouping, plain(DType::f32))};
  if (!c.symmetric_inputs) {
    scheme.offset_kind = OffsetKind::zero_point;
    scheme.offset = parameter(grouping, {.element = &element});
  }
  return scheme;
}

/// Sees what a layer is given while libtorch's way of computing it goes on.
class Observing : public LinearBehaviour {
 public:
  Observing(torch::Tensor weight, const ObserverSettings& settings) : weight_(std::move(weight)), observer_(settings) {}
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override {
    observer_.update(input.detach());
    return torch::linear(input, weight_.to(input.scalar_type()), bias);
  }
  const torch::Tensor& weight() const { return weight_; }
  const Observer& observer() const { return observer_; }

 private:
  torch::Tensor weight_;
  Observer observer_;
};

/// The ranges of the inputs of all layers that are to be quantized, by path, while `calibrate` runs.
class Calibration {
 public:
  Calibration(torch::nn::Module& module, const ModulePlan& plan, const ObserverSettings& settings)
      : module_(module), plan_(plan), training_(module.is_training()) {
    for (const LayerPlan& layer : plan_.layers) {
      if (!layer.plan.scheme) continue;
      const torch::Tensor weight = layer.layer->weight;
      observing_[layer.path] = std::make_shared<Observing>(weight, settings);
      attach(*layer.layer, observing_[layer.path], weight);
    }
    for (const auto& part : module_.modules(/*include_self=*/false)) parts_.emplace_back(part, part->is_training());
    module_.eval();
  }
  Calibration(const Calibration&) = delete;
  Calibration& operator=(const Calibration&) = delete;
  ~Calibration() {
    for (const LayerPlan& layer : plan_.layers)
      if (layer.plan.scheme) detach(*layer.layer, observing_.at(layer.path)->weight());
    module_.train(training_);
    for (const auto& [part, training] : parts_) part->train(training);
  }
  void run(const std::function<void()>& calibrate) {
    const torch::NoGradGuard no_gradients;
    calibrate();
  }
  Range range(const std::string& path) const {
    const Observer& observer = observing_.at(path)->observer();
    if (!observer.has_data())
      throw Error({.code = "needs-calibration",
                   .what = "cannot fix the ranges of inputs",
                   .where = path,
                   .why = "no calibration data reached the layer",
                   .fix = "skip it, or calibrate with data that does"});
    return observer.range();
  }

 private:
  torch::nn::Module& module_;
  const ModulePlan& plan_;
  bool training_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> parts_;  ///< those inside, outer ones first
  std::map<std::string, std::shared_ptr<Observing>> observing_;
};

void fix_inputs(torch::nn::Module& module, ModulePlan& plan, const PtqConfig& config,
                const std::function<void()>& calibrate) {
  if (!calibrate)
    throw Error({.code = "needs-calibration",
                 .what = "cannot quantize",
                 .why = "static quantization fixes the ranges of the layers' inputs, and there is no calibration data",
                 .fix = "give calibration batches, or choose type dynamic or weight_only"});
  const ObserverSettings settings = {.estimate = choose(kWhere, "observer", config.observer, kEstimates),
                                     .averaging = config.averaging,
                                     .percentile = config.percentile};
  check(settings);
  const Scheme scheme = input_scheme(config);
  Calibration calibration(module, plan, settings);
  calibration.run(calibrate);
  for (LayerPlan& layer : plan.layers) {
    if (!layer.plan.scheme) continue;
    layer.plan.linear.input = fixed_activation(scheme, calibration.range(layer.path));
  }
}

std::string describe(const std::optional<ActivationScheme>& inputs) {
  if (!inputs) return {};
  const std::string scheme = bitwright::describe(inputs->scheme);
  if (!ActivationQuantizer::supports(*inputs)) return {};
  return (inputs->dynamic ? "dynamic " : "static ") + scheme;
}

LayerInfo info_of(const std::string& path, const torch::nn::LinearImpl& layer) {
  LayerInfo info = {.path = path, .parameters = layer.weight.numel()};
  const torch::Tensor parameter = parameter_of(layer);
  info.bytes = parameter.defined() ? parameter.nbytes() : 0;
  const auto quantized = quantized_weight_of(layer);
  if (quantized == nullptr || quantized->scheme().is_plain()) return info;
  info.scheme = bitwright::describe(quantized->scheme());
  info.inputs = describe(quantized->linear().input);
  info.bits = quantized->scheme().element->bits;
  info.bytes = quantized->bytes();
  if (const auto ours = std::dynamic_pointer_cast<QuantizedLayer>(quantized))
    info.relative_error = ours->relative_error();
  return info;
}

/// Of several modes the one that says most.
void add_mode(std::string& mode, const QuantizedLinear& linear) {
  constexpr std::array<std::string_view, 4> kOrder = {"none", "weight_only", "dynamic", "static"};
  const std::string_view own = !linear.input ? "weight_only" : linear.input->dynamic ? "dynamic" : "static";
  if (std::ranges::find(kOrder, own) > std::ranges::find(kOrder, mode)) mode = own;
}

}  // namespace

QuantizationInfo quantize_model_ptq(torch::nn::Module& module, const PtqConfig& config,
                                    const std::function<void()>& calibrate) {
  const Container* const container = container_of(config);
  return train::quantize_model_ptq(module, config, {.request = request_of(config), .container = container}, calibrate);
}

QuantizationInfo train::quantize_model_ptq(torch::nn::Module& module, const PtqConfig& config,
                                           const ContainerRequest& request, const std::function<void()>& calibrate) {
  const Inputs inputs = inputs_of(config);
  QuantizationRequest weights = request.request;
  // Calibrated inputs are nothing a container chooses by: they are laid over what it makes of the weights.
  if (request.container->make_linear != nullptr) weights.settings.weight_only = inputs == Inputs::floats;
  ModulePlan plan = plan_module(module, weights, request.container);
  require_plain(plan);
  for (LayerPlan& layer : plan.layers) {
    if (!layer.plan.scheme) continue;
    layer.plan.linear.input.reset();
    if (inputs == Inputs::dynamic) layer.plan.linear.input = ActivationScheme{.scheme = input_scheme(config)};
  }
  if (inputs == Inputs::fixed) fix_inputs(module, plan, config, calibrate);
  quantize_layers(plan);
  QuantizationInfo info = get_quantization_info(module);
  for (const Warning& warning : plan.warnings) info.warnings.push_back(warning.message);
  return info;
}

void dequantize_model(torch::nn::Module& module) {
  std::vector<std::function<void()>> steps;  // nothing is changed before it is known that all layers can be
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    if (behaviour_of(layer) == nullptr) return;
    const auto make_plain = [](torch::nn::LinearImpl& linear, const torch::Tensor& floats) {
      detach(linear, floats.detach().to(torch::kFloat).requires_grad_());
    };
    if (const auto quantized = behaviour_as<QuantizedLinearBehaviour>(layer)) {
      steps.emplace_back([&layer, quantized, make_plain] { make_plain(layer, quantized->decoded()); });
    } else if (behaviour_as<FakeQuantizedLinear>(layer) != nullptr) {
      steps.emplace_back([&layer, make_plain] {
        detach_fake_quantized(layer);
        make_plain(layer, layer.weight);
      });
    } else {
      throw Error({.code = "not-a-weight",
                   .what = "cannot dequantize",
                   .where = path,
                   .why = "the layer has an adapter, which would be lost",
                   .fix = "merge it first"});
    }
  });
  for (const auto& step : steps) step();
}

QuantizationInfo get_quantization_info(const torch::nn::Module& module) {
  QuantizationInfo info;
  std::map<int64_t, int64_t> parameters;  // by bits
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    LayerInfo one = info_of(path, layer);
    info.bytes += one.bytes;
    info.float_bytes += static_cast<uint64_t>(one.parameters) * sizeof(float);
    if (one.bits != 0) {
      parameters[one.bits] += one.parameters;
      add_mode(info.mode, quantized_weight_of(layer)->linear());
    }
    (one.bits != 0 ? info.affected : info.skipped).push_back(std::move(one));
  });
  const auto most = std::ranges::max_element(parameters, {}, [](const auto& item) { return item.second; });
  if (most != parameters.end()) info.bits = most->first;
  if (is_qat_model(module)) info.mode = "qat";
  return info;
}

bool is_model_quantized(const torch::nn::Module& module) {
  bool found = false;
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    found = found || info_of(path, layer).bits != 0;
  });
  return found;
}

OrderedJson to_json(const QuantizationInfo& info) {
  const auto layers = [](const std::vector<LayerInfo>& all) {
    OrderedJson json = OrderedJson::array();
    for (const LayerInfo& layer : all) {
      OrderedJson one = {{"name", layer.path}, {"parameters", layer.parameters}, {"bytes", layer.bytes}};
      if (!layer.scheme.empty()) {
        one["scheme"] = layer.scheme;
        one["bits"] = layer.bits;
        one["inputs"] = layer.inputs;
        one["relative_error"] = layer.relative_error;
      }
      json.push_back(std::move(one));
    }
    return json;
  };
  return {{"quantized", info.bits != 0},
          {"bits", info.bits},
          {"mode", info.mode},
          {"bytes", info.bytes},
          {"float_bytes", info.float_bytes},
          {"affected_layers", layers(info.affected)},
          {"skipped_layers", layers(info.skipped)},
          {"warnings", info.warnings}};
}

OutputDifference compare_outputs(const torch::Tensor& reference, const torch::Tensor& outputs) {
  const torch::NoGradGuard no_gradients;
  const torch::Tensor a = reference.detach().to(torch::kDouble).flatten(),
                      b = outputs.detach().to(torch::kDouble).flatten();
  TORCH_CHECK(a.sizes() == b.sizes(), "outputs of different shapes are compared");
  const double norm = a.norm().item<double>(), other = b.norm().item<double>();
  if (a.numel() == 0) return {};
  return {.relative = norm == 0 ? other : (a - b).norm().item<double>() / norm,
          .cosine = norm == 0 || other == 0 ? 0 : a.dot(b).item<double>() / (norm * other),
          .largest = (a - b).abs().max().item<double>()};
}

}  // namespace bitwright
