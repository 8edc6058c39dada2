#pragma once

#include <map>
#include <nlohmann/json.hpp>  // a quant_config is a JSON value
#include <string>
#include <string_view>
#include <vector>

#include "bitwright/engine/detect.hpp"
#include "bitwright/engine/plan.hpp"
#include "bitwright/json.hpp"

namespace bitwright {

/// The four fields of one configuration: "gemm_dtype" -> "fp8"; fields that are "auto" are left out.
using PrecisionFields = std::map<std::string, std::string>;

/// A `quant_config`: null or empty, one `preset`, several `presets`, and any of the four fields.
/// Throws Error (exit status 2) on an unknown key, preset or value, naming the valid ones.
void validate_quant_config(const OrderedJson& quant_config, const Facts& facts = Facts::standard());

/// The fields a preset stands for, all four of them. Throws Error{"unknown-preset"} with the nearest name.
PrecisionFields expand_preset(std::string_view preset, const Facts& facts = Facts::standard());

/// One configuration for each of `presets`, every other key kept beside it; without `presets` the configuration itself.
std::vector<OrderedJson> expand_quantization_presets(const OrderedJson& quant_config,
                                                     const Facts& facts = Facts::standard());

/// The fields of a configuration with at most one preset: what is explicit overrides the preset.
PrecisionFields resolve_fields(const OrderedJson& quant_config, const Facts& facts = Facts::standard());

/// Where a field's value comes from: "quant_config", "preset kv-cache-fp8", or empty for "auto".
std::string field_origin(const OrderedJson& quant_config, std::string_view field,
                         const Facts& facts = Facts::standard());

/// FP8 while loading (`gemm_dtype` fp8, also by a preset) is for a model that nothing has quantized yet.
bool should_apply_dynamic_fp8(const OrderedJson& quant_config, const DetectedQuantization& model_quantization,
                              const Facts& facts = Facts::standard());

/// One line: "No quantization", "Presets: a, b", "GEMM: fp8, KV Cache: fp8_e5m2, Attention: auto, MoE: auto".
std::string get_quant_config_summary(const OrderedJson& quant_config);

/// `given` over `derived`: the user's parameters always win. Names are compared without leading dashes, letter case and
/// '_' for '-' aside (single letters keep their case); null and an empty list say nothing, of a list the first element
/// counts. Booleans stay flags, other values become text. The result's names carry leading dashes.
OrderedJson merge_parameters(const OrderedJson& derived, const OrderedJson& given);

/// What else is known when a configuration becomes arguments; what is left out is unknown.
struct Target {
  std::string version{};           ///< of the engine; empty: the one its facts were read from
  Json hardware = Json::object();  ///< a document of `hardware` facts, or {"vendor": "nvidia", "sm": 90}
  Json model = Json::object();     ///< facts of the model, over those that were detected: {"moe": true}
};
/// The arguments of a runtime ("vllm", "tensorrt-llm" ...) for a configuration with at most one preset. The user's own
/// parameters are kept as they are and win over derived ones; a list counts by its first element.
EnginePlan get_runtime_args(std::string_view runtime, const OrderedJson& quant_config,
                            const OrderedJson& user_parameters = {},
                            const DetectedQuantization& model_quantization = {}, const Target& target = {},
                            const Facts& facts = Facts::standard());
EnginePlan map_to_vllm_args(const OrderedJson& quant_config, const OrderedJson& user_parameters = {},
                            const DetectedQuantization& model_quantization = {}, const Target& target = {});
EnginePlan map_to_sglang_args(const OrderedJson& quant_config, const OrderedJson& user_parameters = {},
                              const DetectedQuantization& model_quantization = {}, const Target& target = {});
EnginePlan map_to_tensorrt_llm_args(const OrderedJson& quant_config, const OrderedJson& user_parameters = {},
                                    const DetectedQuantization& model_quantization = {}, const Target& target = {});

/// One experiment of a grid.
struct Experiment {
  OrderedJson quant_config, parameters;
};
/// Every combination of the presets and of the parameters' lists, in their order; presets vary slowest. An empty list
/// says nothing. Throws Error{"too-many-experiments"} above `most`.
std::vector<Experiment> prepare_experiment_parameters(const OrderedJson& quant_config, const OrderedJson& parameters,
                                                      size_t most = 100000, const Facts& facts = Facts::standard());

/// A study's configuration as one engine sees it: what `engines.NAME` says laid over the rest, member by member, and
/// `engines` gone. Throws Error{"unknown-engine"} for a section of an engine nobody knows.
OrderedJson settings_of_engine(const OrderedJson& config, std::string_view engine,
                               const Facts& facts = Facts::standard());
/// The arguments of one engine for a study's configuration: `quantization`, `quant_config`, `parameters`, `hardware`
/// (a name) and `engine.version`, each of them perhaps another under `engines.NAME` (SPECIFICATION A4).
EnginePlan to_backend_params(const OrderedJson& config, std::string_view engine,
                             const DetectedQuantization& model_quantization = {}, const Target& target = {},
                             const Facts& facts = Facts::standard());
/// The `quantization` block as an Intent.
Intent intent_of(const OrderedJson& quantization);
/// 8, 4 ... or 0: what a method means (SPECIFICATION A2).
int bits_of(std::string_view method);

}  // namespace bitwright
