#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bitwright/torch/quantization_config.hpp"

namespace bitwright {

/// Adapters of low rank (arXiv:2106.09685): y = base(x) + scaling B A dropout(x). The fields and what they mean are
/// those of PEFT's LoraConfig.
struct LoraConfig {
  int64_t r = 16;
  double lora_alpha = 16;
  double lora_dropout = 0;
  /// Ends of paths ("q_proj", "mlp.up_proj"), globs, or "all-linear": all but the head.
  std::vector<std::string> target_modules = {"all-linear"};
  std::vector<std::string> exclude_modules{};  ///< likewise; wins
  bool use_rslora = false;                     ///< scaling is lora_alpha / sqrt(r) instead of lora_alpha / r
  /// "default": A as torch::nn::Linear has it, B zero. "gaussian": A normal with deviation 1 / r, B zero. "loftq":
  /// prepare_qlora() chooses codes, A and B together, so that the start is nearest to the float model
  /// (arXiv:2310.08659).
  std::string init_lora_weights = "default";
  int64_t loftq_iterations = 5;
  std::string base_model{};     ///< base_model_name_or_path of the files
  bool fan_in_fan_out = false;  ///< the base's files store matrices [inputs, outputs] (GPT-2)

  double scaling() const;
};

/// Throws Error (exit status 2) for what is out of range: one line.
void check_lora_config(const LoraConfig& config);

/// Freezes all of the model and gives each linear layer that the configuration targets an adapter: modules lora_A and
/// lora_B of the layer, f32, the only parameters that learn. The base may be floats of any type or quantized. Random
/// numbers are those of libtorch's generator. Returns the paths.
/// Throws Error{"no-target"} where nothing is matched or an end matches nothing, {"already-adapted"} for a layer that
/// has an adapter, {"bad-config"} for "loftq", which is prepare_qlora's.
std::vector<std::string> add_lora(torch::nn::Module& model, const LoraConfig& config = {});

/// bitsandbytes' nf4 with nested scales.
QuantizationConfig qlora_base();
/// QLoRA (arXiv:2305.14314): the model's linear layers that are floats are quantized and frozen, then add_lora. Layers
/// that are quantized already stay as they are.
std::vector<std::string> prepare_qlora(torch::nn::Module& model, const LoraConfig& config = {},
                                       const QuantizationConfig& base = qlora_base());

/// adapter_model.safetensors and adapter_config.json as PEFT writes and reads them; the directory appears whole or not
/// at all. Throws Error{"no-adapter"} for a model without any.
void save_lora(const torch::nn::Module& model, const LoraConfig& config, const std::filesystem::path& directory);
/// What adapter_config.json says. Throws Error{"bad-adapter"} for what is no LoRA, or of a kind that is not known here
/// (DoRA, ranks that differ between layers …): adapters are never applied by half.
LoraConfig read_lora_config(const std::filesystem::path& directory);
/// Gives the model the adapters that the directory holds (add_lora, unless it has them already). Returns their
/// configuration. Throws Error{"bad-adapter"} naming the tensor where one is missing, unexpected or of another shape;
/// then the model is as it was.
LoraConfig load_lora(torch::nn::Module& model, const std::filesystem::path& directory);

enum class LoraMerge : uint8_t {
  floats,      ///< weights become f32, or the type of the base's floats
  requantize,  ///< rounded to the base's scheme again; float layers stay floats
};
struct LoraMergeReport {
  int64_t layers = 0;
  double relative_error = 0;  ///< of the merged weights by rounding: |rounded - merged| / |merged|, over all of them
  /// What the model loses: with adapters, merged in floats and as it is now. None without `loss`.
  std::optional<double> loss_before{}, loss_floats{}, loss{};
};
/// Adds the adapters to the weights and removes them. loss: measures the model, called before, where weights are floats
/// (while requantizing one layer's at a time), and at the end; null: nothing is measured.
/// Throws Error{"no-adapter"}.
LoraMergeReport merge_lora(torch::nn::Module& model, LoraMerge into, const std::function<double()>& loss = nullptr);

}  // namespace bitwright
