#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"

namespace bitwright {

/// What adapter_config.json says of a LoRA. Source: huggingface/peft, src/peft/tuners/lora/config.py, whose names and
/// defaults these are.
struct PeftLora {
  int64_t r = 8;
  double lora_alpha = 8, lora_dropout = 0;
  bool use_rslora = false, fan_in_fan_out = false;
  /// Ends of paths, or "all-linear"; none where the file has a regular expression of Python's instead: what that
  /// matches is what the weights' file holds (peft_layers).
  std::optional<std::vector<std::string>> target_modules{};
  std::vector<std::string> exclude_modules{};
  std::string base_model{};  ///< base_model_name_or_path
};
/// Throws Error{"bad-adapter"} (or "bad-json") naming `where` and the field for what is no LoRA, or one with which
/// layers compute, or were trained on, something else than W + scaling B A: adapters are never applied by half.
PeftLora parse_peft_lora(std::string_view json, const std::string& where);

/// "base_model.model.PATH.lora_A.weight", factor "lora_A" or "lora_B": the tensors of adapter_model.safetensors.
std::string peft_key(const std::string& path, const std::string& factor);
/// The paths of the layers whose lora_A is among these tensors.
std::vector<std::string> peft_layers(std::span<const std::string_view> keys);

[[noreturn]] void fail_bad_adapter(const std::string& where, const std::string& why, const std::string& fix = {});

}  // namespace bitwright
