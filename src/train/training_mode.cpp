#include "train/training_mode.hpp"

#include "recipe/config.hpp"

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

// Integer weights that learn.

bool wants_finetuning(const TrainingConfig& config) { return config.enable_quantized_finetuning; }

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

bool always(const TrainingConfig&) { return true; }

const TrainingMode kModes[] = {
    {.name = "quantized_finetuning",
     .wanted = wants_finetuning,
     .prepare = prepare_finetuning},
    {.name = "plain", .wanted = always},
};

}  // namespace

const TrainingMode& training_mode(const TrainingConfig& config) {
  for (const TrainingMode& mode : kModes)
    if (mode.wanted(config)) return mode;
  return kModes[std::size(kModes) - 1];
}

}  // namespace bitwright::train
