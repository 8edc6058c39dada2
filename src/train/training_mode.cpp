#include "train/training_mode.hpp"

#include "bitwright/torch/lora.hpp"
#include "bitwright/torch/ptq.hpp"
#include "bitwright/torch/qat.hpp"
#include "recipe/config.hpp"
#include "recipe/recipe.hpp"
#include "train/fake_quantized_linear.hpp"
#include "train/keep_frozen.hpp"
#include "train/lora.hpp"
#include "train/quantized_finetuning.hpp"
#include "train/quantized_module.hpp"

namespace bitwright::train {
namespace {

/// The section `quantization`, where the method is missing by quantization_bits.
OrderedJson section_of(const TrainingConfig& config) {
  OrderedJson section = {{"method", fmt::format("int{}", config.quantization_bits)}};
  if (!config.quantization.empty()) section.update(parse_ordered_json(config.quantization, "quantization"));
  return section;
}

/// What of a section stands at "scheme.NAME", or the fallback.
template <class T>
T scheme_value(const OrderedJson& section, const std::string& name, T fallback) {
  const OrderedJson* found = find_config(section, "scheme." + name);
  return found == nullptr ? fallback : found->get<T>();
}

/// The section as a recipe has it. The head is a layer like others unless skip_modules names it.
ContainerRequest request_of(OrderedJson section, const Container* container) {
  OrderedJson whole = {{"quantization", std::move(section)}};
  check_config(whole, "quantization");
  ContainerRequest out = {.request = read_request(whole), .container = container};
  if (!out.request.skips_given) out.request.skip_modules.clear();
  return out;
}

OrderedJson described(const char* method, const OrderedJson& settings, const std::vector<std::string>& layers) {
  return {{"method", method}, {"settings", settings}, {"layers", layers}};
}

// Quantization-aware training. The fields alone quantize what goes into layers too, as quantization_type says; a
// section says it itself (weight_only, true where it is not there).

bool wants_qat(const TrainingConfig& config) { return config.quantization_mode == "qat"; }

QatConfig qat_config(const TrainingConfig& config) {
  QatConfig qat = {.quantization = section_of(config),
                   .format = config.container,
                   .scales = config.qat.scales,
                   .initial_scales = config.qat.initial_scales,
                   .activation_type = config.qat.activation_type,
                   .symmetric_activations = config.qat.symmetric_activations,
                   .activation_ranges = config.qat.activation_ranges,
                   .averaging = config.qat.averaging,
                   .percentile = config.qat.percentile};
  const bool weight_only = config.quantization.empty() ? false : qat.quantization.value("weight_only", true);
  qat.quantization.erase("weight_only");
  qat.quantization.erase("mode");
  qat.activations = weight_only ? "none" : config.quantization_type;
  return qat;
}

/// What the model loses where it is rounded and learns nothing.
void measure_qat(const Beginning& beginning) {
  if (!beginning.loss) return;
  OrderedJson& losses = beginning.result["qat"] = {{"loss_floats", beginning.loss()}};
  QatConfig rounded = qat_config(beginning.config);
  rounded.scales = "computed";
  if (rounded.activation_ranges == "learned") rounded.activation_ranges = "moving_average";
  prepare_model_for_qat(beginning.model, rounded);
  if (rounded.activations == "static") beginning.calibrate();
  losses["loss_rounded"] = beginning.loss();
  for_each_linear(beginning.model, [](const std::string&, torch::nn::LinearImpl& layer) {
    if (behaviour_as<FakeQuantizedLinear>(layer) != nullptr) detach_fake_quantized(layer);
  });
}

Prepared prepare_qat(CausalLm& model, const TrainingConfig& config, std::vector<Warning>& warnings) {
  const QatConfig qat = qat_config(config);
  const QatLayers layers = prepare_model_for_qat(model, qat);
  for (const std::string& warning : layers.warnings) warnings.push_back({"QAT", warning});
  OrderedJson quantization = described("qat", layers.settings, layers.quantized);
  quantization["activations"] = qat.activations;
  return {.quantization = std::move(quantization)};
}

bool finish_qat(const Ending& ending) {
  if (ending.loss) ending.result["qat"]["loss_learned"] = ending.result["val_loss"];
  ending.result["quantized_layers"] = convert_qat_model(ending.model);
  return true;
}

// Quantization after training.

bool wants_ptq(const TrainingConfig& config) { return config.quantization_mode == "ptq"; }

bool finish_ptq(const Ending& ending) {
  const TrainingConfig& config = ending.config;
  OrderedJson section = section_of(config);
  const bool weight_only = config.quantization.empty() ? false : section.value("weight_only", true);
  section.erase("weight_only");
  const PtqConfig inputs = {.type = weight_only ? "weight_only" : config.quantization_type,
                            .quant_type = scheme_value<std::string>(section, "quant_type", "int")};
  const QuantizationInfo info =
      quantize_model_ptq(ending.model, inputs, request_of(section, find_container(config.container)), ending.calibrate);
  for (const std::string& warning : info.warnings) ending.warnings.push_back({"PTQ", warning});
  ending.result["quantized_layers"] = info.affected.size();
  return true;
}

// Integer weights that learn.

bool wants_finetuning(const TrainingConfig& config) { return config.enable_quantized_finetuning; }

void load_finetuning(const TrainingConfig&, CausalLmOptions& options) { options.load_linear = keep_quantized; }

/// What the section leaves open: symmetric, a scale a row.
OrderedJson finetuning_section(const TrainingConfig& config) {
  OrderedJson section = section_of(config);
  OrderedJson& scheme = section["scheme"];
  if (!scheme.contains("granularity") && !scheme.contains("group_size")) scheme["granularity"] = "channel";
  if (!scheme.contains("symmetric")) scheme["symmetric"] = true;
  return section;
}

Prepared prepare_finetuning(CausalLm& model, const TrainingConfig& config, std::vector<Warning>&) {
  const OrderedJson section = finetuning_section(config);
  const QuantizedFinetuningConfig finetuning = {.beta1 = config.betas[0],
                                                .beta2 = config.betas[1],
                                                .epsilon = config.epsilon,
                                                .weight_decay = config.weight_decay,
                                                .eight_bit_optimizer = config.optimizer == "adamw8bit",
                                                .seed = static_cast<uint64_t>(config.seed)};
  Prepared prepared = {.finetuning =
                           enable_quantized_finetuning(model, finetuning, request_of(section, /*container=*/nullptr))};
  prepared.quantization = described("quantized_finetuning", section, prepared.finetuning->layers());
  return prepared;
}

// Adapters, on a base as it is or quantized here.

bool wants_lora(const TrainingConfig& config) { return config.lora.r > 0; }

/// What is to be quantized here is read as floats; otherwise nothing is: the base stays as it is stored.
void load_lora_base(const TrainingConfig& config, CausalLmOptions& options) {
  options.load_linear = config.quantization.empty() ? keep_frozen : keep_quantized;
  if (config.quantization.empty()) options.load_embedding = keep_table;
}

LoraConfig lora_config(const TrainingConfig& config) {
  return {.r = config.lora.r,
          .lora_alpha = config.lora.alpha,
          .lora_dropout = config.lora.dropout,
          .target_modules = config.lora.target_modules,
          .init_lora_weights = config.lora.init,
          .base_model = config.model};
}

/// The paths of layers whose weights are codes.
std::vector<std::string> quantized_paths(const CausalLm& model) {
  std::vector<std::string> paths;
  for_each_linear(model, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    if (quantized_weight_of(layer) != nullptr) paths.push_back(path);
  });
  return paths;
}

Prepared prepare_lora(CausalLm& model, const TrainingConfig& config, std::vector<Warning>&) {
  const LoraConfig lora = lora_config(config);
  if (config.quantization.empty()) {
    add_lora(model, lora);
    return {};
  }
  const OrderedJson section = section_of(config);
  OrderedJson whole = {{"quantization", section}};
  check_config(whole, "quantization");
  prepare_qlora(model, lora, read_request(whole), find_container(config.container));
  return {.quantization = described("qlora", section, quantized_paths(model))};
}

bool finish_lora(const Ending& ending) {
  const TrainingConfig& config = ending.config;
  std::filesystem::remove_all(ending.adapter);
  save_lora(ending.model, lora_config(config), ending.adapter);
  ending.result["adapter"] = ending.adapter.string();
  if (config.lora.merge == "none") return false;
  const LoraMergeReport report =
      merge_lora(ending.model, config.lora.merge == "floats" ? LoraMerge::floats : LoraMerge::requantize, ending.loss);
  OrderedJson& merge = ending.result["merge"] = {{"layers", report.layers}, {"relative_error", report.relative_error}};
  if (report.loss_before) merge["loss_before"] = *report.loss_before;
  if (report.loss_floats) merge["loss_floats"] = *report.loss_floats;
  if (report.loss) merge["loss"] = *report.loss;
  return true;
}

bool always(const TrainingConfig&) { return true; }

const TrainingMode kModes[] = {
    {.name = "qat", .wanted = wants_qat, .measure = measure_qat, .prepare = prepare_qat, .finish = finish_qat},
    {.name = "ptq", .wanted = wants_ptq, .finish = finish_ptq},
    {.name = "quantized_finetuning",
     .wanted = wants_finetuning,
     .load = load_finetuning,
     .prepare = prepare_finetuning},
    {.name = "lora",
     .wanted = wants_lora,
     .frozen = true,
     .load = load_lora_base,
     .prepare = prepare_lora,
     .finish = finish_lora},
    {.name = "plain", .wanted = always},
};

}  // namespace

const TrainingMode& training_mode(const TrainingConfig& config) {
  for (const TrainingMode& mode : kModes)
    if (mode.wanted(config)) return mode;
  return kModes[std::size(kModes) - 1];
}

}  // namespace bitwright::train
