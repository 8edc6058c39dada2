#pragma once

#include <concepts>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>  // what is read and what is found are JSON values
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bitwright/json.hpp"

namespace bitwright {

/// The small files of a model that say how it is quantized, by name: "config.json", "hf_quant_config.json",
/// "quantize_config.json", "quant_config.json", "quantization_metadata.json", "mlc-chat-config.json" ...; absent: not
/// there.
using ModelDocuments = std::map<std::string, Json, std::less<>>;

/// What a checkpoint says about its own quantization.
struct DetectedQuantization {
  std::string method{};    ///< as its owner calls it: "gptq", "compressed-tensors", "modelopt"; empty: none declared
  double bits = 0;         ///< of a weight's code; 0: not declared, or mixed
  int64_t group_size = 0;  ///< weights that share a scale; -1: a whole row (channel); 0: not declared or a tensor
  std::string scheme{};    ///< "int", "fp8", "fp8 block 128x128", "nf4", "NVFP4", "mixed" ...
  std::string mode{};      ///< "weight-only"; of quantized activations "static" or "dynamic"; empty: not declared
  std::optional<bool> symmetric{};      ///< no zero points
  std::vector<std::string> affected{};  ///< modules or kinds of them that are quantized, where they are named
  std::vector<std::string> skipped{};   ///< modules that are not quantized: names, prefixes or patterns
  std::string evidence{};               ///< the file and member that say so
  std::string hint{};                   ///< what the name suggests and nothing confirms; never evidence
  Json facts =
      Json::object();  ///< for PlanRequest::model: bits, sym, desc_act, group_size, scheme, kv_cache_scheme ...
};

/// Reads the documents in the order the engines do; the first that declares a method decides. `name` (of the directory
/// or the file) gives a hint only. Never throws: a member of the wrong type is as good as absent.
DetectedQuantization detect_model_quantization(const ModelDocuments& documents, std::string_view name = {});

/// The same for a model on disk, a directory or a file of it: where no document declares anything, the weight files'
/// headers do, by names, types and shapes of their arrays. `facts` holds model_facts as well, so that the result is all
/// that planning needs. Weights that cannot be read are passed over where documents say what the model is.
/// Throws Error: "cannot-open" or "no-model" if there is none, and what is wrong with the documents or the named file.
DetectedQuantization detect_model_at(const std::filesystem::path& model);
template <std::convertible_to<std::filesystem::path> Path>  // so that documents in braces are never taken for a path
DetectedQuantization detect_model_quantization(const Path& model) {
  return detect_model_at(model);
}

/// What a config.json says of the architecture, as far as planning needs it: arch, model_type, moe, mla, head_dim,
/// layers, kv_heads, heads, hidden_size, kv_lora_rank, sliding_window, context, dtype. Members it does not give are
/// absent.
Json model_facts(const Json& config);

}  // namespace bitwright
