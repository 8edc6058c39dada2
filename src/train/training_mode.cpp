#include "train/training_mode.hpp"

#include "bitwright/torch/lora.hpp"
#include "bitwright/torch/ptq.hpp"
#include "bitwright/torch/qat.hpp"
#include "recipe/config.hpp"
#include "recipe/recipe.hpp"
#include "train/keep_frozen.hpp"
#include "train/plan.hpp"
#include "train/quantized_linear.hpp"

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

std::vector<std::string> skipped(const OrderedJson& section) {
  return section.value("skip_modules", std::vector<std::string>());
}

OrderedJson described(const char* method, const OrderedJson& settings, const std::vector<std::string>& layers) {
  return {{"method", method}, {"settings", settings}, {"layers", layers}};
}

// Quantization-aware training. The fields alone quantize what goes into layers too, as quantization_type says; a
// section says it itself (weight_only, true where it is not there).

bool wants_qat(const TrainingConfig& config) { return config.quantization_mode == "qat"; }

Prepared prepare_qat(CausalLm& model, const TrainingConfig& config, std::vector<Warning>& warnings) {
  QatConfig qat = {.quantization = section_of(config), .format = config.container};
  const bool weight_only = config.quantization.empty() ? false : qat.quantization.value("weight_only", true);
  qat.quantization.erase("weight_only");
  qat.quantization.erase("mode");
  qat.activations = weight_only ? "none" : config.quantization_type;
  const QatLayers layers = prepare_model_for_qat(model, qat);
  for (const std::string& warning : layers.warnings) warnings.push_back({"QAT", warning});
  OrderedJson quantization = described("qat", layers.settings, layers.quantized);
  quantization["activations"] = qat.activations;
  return {.quantization = std::move(quantization)};
}

bool finish_qat(const Ending& ending) {
  ending.result["quantized_layers"] = convert_qat_model(ending.model);
  return true;
}

// Quantization after training.

bool wants_ptq(const TrainingConfig& config) { return config.quantization_mode == "ptq"; }

bool finish_ptq(const Ending& ending) {
  const OrderedJson section = section_of(ending.config);
  const bool weight_only = ending.config.quantization.empty() ? false : section.value("weight_only", true);
  PtqConfig ptq = {.type = weight_only ? "weight_only" : ending.config.quantization_type,
                   .bits = scheme_value<int64_t>(section, "bits", ending.config.quantization_bits),
                   .quant_type = scheme_value<std::string>(section, "quant_type", "int"),
                   .format = ending.config.container,
                   .skip_modules = skipped(section)};
  if (find_config(section, "scheme.granularity")) ptq.granularity = section["scheme"]["granularity"];
  if (find_config(section, "scheme.group_size")) ptq.group_size = section["scheme"]["group_size"];
  if (find_config(section, "scheme.symmetric")) ptq.symmetric = section["scheme"]["symmetric"];
  if (section.contains("layer_configs")) ptq.layer_configs = section["layer_configs"];
  const QuantizationInfo info = quantize_model_ptq(ending.model, ptq, ending.calibrate);
  for (const std::string& warning : info.warnings) ending.warnings.push_back({"PTQ", warning});
  ending.result["quantized_layers"] = info.affected.size();
  return true;
}

// Integer weights that learn.

bool wants_finetuning(const TrainingConfig& config) { return config.enable_quantized_finetuning; }

void load_finetuning(const TrainingConfig&, CausalLmOptions& options) { options.load_linear = keep_quantized; }

Prepared prepare_finetuning(CausalLm& model, const TrainingConfig& config, std::vector<Warning>&) {
  const OrderedJson section = section_of(config);
  const QuantizedFinetuningConfig finetuning = {
      .bits = static_cast<int>(scheme_value<int64_t>(section, "bits", config.quantization_bits)),
      .granularity = scheme_value<std::string>(section, "granularity", "channel"),
      .group_size = scheme_value<int64_t>(section, "group_size", 64),
      .symmetric = scheme_value<bool>(section, "symmetric", true),
      .skip_modules = skipped(section),
      .beta1 = config.betas[0],
      .beta2 = config.betas[1],
      .epsilon = config.epsilon,
      .weight_decay = config.weight_decay,
      .eight_bit_optimizer = config.optimizer == "adamw8bit",
      .seed = static_cast<uint64_t>(config.seed)};
  Prepared prepared = {.finetuning = enable_quantized_finetuning(model, finetuning)};
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

/// The floats of the base become what the section says.
std::vector<std::string> quantize_base(CausalLm& model, const OrderedJson& section, const TrainingConfig& config,
                                       std::vector<Warning>& warnings) {
  OrderedJson whole = {{"quantization", section}};
  check_config(whole, "quantization");
  const Container* container = find_container(config.container);
  const ModulePlan plan = plan_module(model, read_request(whole), container);
  warnings.insert(warnings.end(), plan.warnings.begin(), plan.warnings.end());
  std::vector<std::string> paths;
  for (const LayerPlan& layer : plan.layers) {
    if (!layer.plan.scheme || behaviour_of(*layer.layer)) continue;
    const torch::NoGradGuard no_gradients;
    attach_quantized(*layer.layer, std::make_shared<QuantizedLinearBehaviour>(
                                       quantize_weight(layer.plan, layer.layer->weight), layer.plan.linear, container));
    paths.push_back(layer.path);
  }
  return paths;
}

Prepared prepare_lora(CausalLm& model, const TrainingConfig& config, std::vector<Warning>& warnings) {
  const LoraConfig lora = lora_config(config);
  check_lora_config(lora);
  Prepared prepared;
  if (lora.init_lora_weights == "loftq") {
    prepare_qlora(model, lora);
    prepared.quantization = described("qlora", section_of(config), {});
    return prepared;
  }
  if (!config.quantization.empty()) {
    const OrderedJson section = section_of(config);
    prepared.quantization = described("qlora", section, quantize_base(model, section, config, warnings));
  }
  add_lora(model, lora);
  return prepared;
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
    {.name = "qat", .wanted = wants_qat, .prepare = prepare_qat, .finish = finish_qat},
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
