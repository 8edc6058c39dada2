#include "bitwright/torch/qat.hpp"

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "recipe/config.hpp"
#include "train/config_choice.hpp"
#include "train/fake_quantized_linear.hpp"
#include "train/quantized_module.hpp"

namespace bitwright {
namespace {

using namespace train;
using Inputs = InputQuantization::Scales;

constexpr const char* kWhere = "QatConfig";

enum class Scales : uint8_t { automatic, learned, computed };
constexpr std::array<std::pair<std::string_view, Scales>, 3> kScales = {
    {{"auto", Scales::automatic}, {"learned", Scales::learned}, {"computed", Scales::computed}}};
constexpr std::array<std::pair<std::string_view, FakeQuantizedLinear::Start>, 2> kStarts = {
    {{"search", FakeQuantizedLinear::Start::search}, {"lsq", FakeQuantizedLinear::Start::lsq}}};

enum class Activations : uint8_t { automatic, none, dynamic, fixed };
constexpr std::array<std::pair<std::string_view, Activations>, 4> kActivations = {{{"auto", Activations::automatic},
                                                                                   {"none", Activations::none},
                                                                                   {"dynamic", Activations::dynamic},
                                                                                   {"static", Activations::fixed}}};
/// Nothing: learned.
constexpr std::array<std::pair<std::string_view, std::optional<RangeEstimate>>, 4> kRanges = {
    {{"minmax", RangeEstimate::minmax},
     {"moving_average", RangeEstimate::moving_average},
     {"percentile", RangeEstimate::percentile},
     {"learned", std::nullopt}}};

const ElementType& activation_element(const QatConfig& c) {
  const std::array<std::pair<std::string_view, const ElementType*>, 4> known = {
      {{"int8", &integer_element(8, c.symmetric_activations)},
       {"int4", &integer_element(4, c.symmetric_activations)},
       {"e4m3", &float_element(DType::f8_e4m3)},
       {"e5m2", &float_element(DType::f8_e5m2)}}};
  return *choose(kWhere, "activation_type", c.activation_type, known);
}

/// What a container says of the layer (W8A8, dynamic fp8) holds where the configuration leaves it open.
InputQuantization input_quantization(const QatConfig& c, const QuantizedLinear& linear) {
  const Activations asked = choose(kWhere, "activations", c.activations, kActivations);
  const auto estimate = choose(kWhere, "activation_ranges", c.activation_ranges, kRanges);
  InputQuantization input;
  input.observer = {
      .estimate = estimate.value_or(RangeEstimate::minmax), .averaging = c.averaging, .percentile = c.percentile};
  check(input.observer);
  if (asked == Activations::none || (asked == Activations::automatic && !linear.input)) return input;
  if (asked == Activations::automatic) {
    if (!linear.input->dynamic) bad_config(kWhere, "activations: this scheme's inputs are calibrated", "say 'static'");
    if (!ActivationQuantizer::supports(*linear.input))
      bad_config(kWhere, fmt::format("activations: {} is not computed here", describe(linear.input->scheme)),
                 "say 'none' or 'dynamic'");
    input.scales = Inputs::dynamic;
    input.scheme = linear.input->scheme;
    return input;
  }
  const bool dynamic = asked == Activations::dynamic;
  const Grouping grouping = dynamic ? Grouping::channel() : Grouping::tensor();
  input.scheme = {.element = &activation_element(c), .scale = parameter(grouping, plain(DType::f32))};
  if (!c.symmetric_activations) {
    if (input.scheme.element->kind != ElementKind::integer)
      bad_config(kWhere, fmt::format("symmetric_activations: {} has no zero point", c.activation_type));
    input.scheme.offset_kind = OffsetKind::zero_point;
    input.scheme.offset = parameter(grouping, {.element = input.scheme.element});
  }
  input.scales = dynamic ? Inputs::dynamic : estimate ? Inputs::observed : Inputs::learned;
  if (input.scales == Inputs::learned && !integer_grid(input.scheme))
    bad_config(kWhere, fmt::format("activation_ranges: those of {} cannot be learned", c.activation_type),
               "say 'moving_average'");
  return input;
}

/// Those of the section, checked as in a configuration file; the head is a layer like others unless it is skipped.
QuantizationRequest request_of(const QatConfig& c) {
  OrderedJson config = {{"quantization", c.quantization}};
  check_config(config, kWhere);
  QuantizationRequest request = read_request(config);
  if (!request.skips_given) request.skip_modules.clear();
  return request;
}

std::shared_ptr<FakeQuantizedLinear> learning_layer(const LayerPlan& layer, const QatConfig& config) {
  const Scales scales = choose(kWhere, "scales", config.scales, kScales);
  const bool can_learn = integer_grid(*layer.plan.scheme).has_value();
  if (scales == Scales::learned && !can_learn)
    bad_config(kWhere,
               fmt::format("scales: those of '{}' ({}) cannot be learned", layer.path, describe(*layer.plan.scheme)),
               "say 'auto' or 'computed'");
  return std::make_shared<FakeQuantizedLinear>(*layer.layer, layer.plan, can_learn && scales != Scales::computed,
                                               choose(kWhere, "initial_scales", config.initial_scales, kStarts),
                                               input_quantization(config, layer.plan.linear));
}

}  // namespace

QatLayers prepare_model_for_qat(torch::nn::Module& module, const QatConfig& config) {
  const Container* const container = find_container(config.format);
  if (container == nullptr)
    bad_config(kWhere, fmt::format("format: there is no container '{}'", printable(config.format)),
               "see `bitwright formats`");
  const ModulePlan plan = plan_module(module, request_of(config), container);
  require_plain(plan);
  if (std::ranges::none_of(plan.layers, [](const LayerPlan& layer) { return layer.plan.scheme.has_value(); }))
    throw Error({.code = "nothing-to-quantize",
                 .what = "nothing to quantize",
                 .why = "no layer has a method",
                 .status = ExitStatus::usage});
  QatLayers out = {.settings = plan.settings};
  for (const Warning& warning : plan.warnings) out.warnings.push_back(warning.message);
  std::vector<std::shared_ptr<FakeQuantizedLinear>> learning;
  for (const LayerPlan& layer : plan.layers)
    learning.push_back(layer.plan.scheme ? learning_layer(layer, config) : nullptr);
  for (size_t i = 0; i < learning.size(); ++i) {
    (learning[i] != nullptr ? out.quantized : out.kept).push_back(plan.layers[i].path);
    if (learning[i] != nullptr) attach_fake_quantized(*plan.layers[i].layer, learning[i]);
  }
  return out;
}

int64_t convert_qat_model(torch::nn::Module& module) {
  struct Converted {
    torch::nn::LinearImpl* layer;
    std::shared_ptr<QuantizedLayer> behaviour;
  };
  std::vector<Converted> all;
  for_each_linear(module, [&](const std::string&, torch::nn::LinearImpl& layer) {
    const auto learned = behaviour_as<FakeQuantizedLinear>(layer);
    if (learned != nullptr)
      all.push_back({&layer, std::make_shared<QuantizedLayer>(learned->quantized(), learned->linear())});
  });
  if (all.empty())
    throw Error({.code = "not-qat",
                 .what = "cannot convert",
                 .why = "no layer of this model learns through fake quantization",
                 .fix = "call prepare_model_for_qat() and train first"});
  for (const Converted& one : all) {
    detach_fake_quantized(*one.layer);
    attach_quantized(*one.layer, one.behaviour);
  }
  return static_cast<int64_t>(all.size());
}

bool is_qat_model(const torch::nn::Module& module) {
  bool found = false;
  for_each_linear(module, [&](const std::string&, torch::nn::LinearImpl& layer) {
    found = found || behaviour_as<FakeQuantizedLinear>(layer) != nullptr;
  });
  return found;
}

}  // namespace bitwright
