#pragma once

#include <map>
#include <nlohmann/json.hpp>  // a quant_config is a JSON value
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "engine/plan.hpp"

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

/// FP8 while loading is for a model that nothing has quantized yet.
bool should_apply_dynamic_fp8(const PrecisionFields& fields, std::string_view checkpoint);

/// One line: "No quantization", "Presets: a, b", "GEMM: fp8, KV Cache: fp8_e5m2, Attention: auto, MoE: auto".
std::string get_quant_config_summary(const OrderedJson& quant_config);

/// What stands around a quant_config when it becomes arguments.
struct Surroundings {
  OrderedJson parameters = OrderedJson::object();  ///< the user's own; a list counts by its first element
  std::string checkpoint{};                        ///< what the model is quantized with, if it is
  Json model = Json::object(), hardware = Json::object();
  std::string version{};
};
/// The arguments of a runtime ("vllm", "tensorrt-llm" ...) for a configuration with at most one preset.
EnginePlan get_runtime_args(std::string_view runtime, const OrderedJson& quant_config, const Surroundings& around,
                            const Facts& facts = Facts::standard());
EnginePlan map_to_vllm_args(const OrderedJson& quant_config, const Surroundings& around);
EnginePlan map_to_sglang_args(const OrderedJson& quant_config, const Surroundings& around);
EnginePlan map_to_tensorrt_llm_args(const OrderedJson& quant_config, const Surroundings& around);

/// One experiment of a grid.
struct Experiment {
  OrderedJson quant_config, parameters;
};
/// Every combination of the presets and of the parameters' lists, in their order; presets vary slowest. An empty list
/// says nothing. Throws Error{"too-many-experiments"} above `most`.
std::vector<Experiment> prepare_experiment_parameters(const OrderedJson& quant_config, const OrderedJson& parameters,
                                                      size_t most = 100000, const Facts& facts = Facts::standard());

/// The top-level `quantization` block as one engine sees it, with what `engines.NAME.quantization` says laid over it,
/// and the arguments that follow (SPECIFICATION A4).
EnginePlan to_backend_params(const OrderedJson& config, std::string_view engine, const Surroundings& around,
                             const Facts& facts = Facts::standard());
/// The `quantization` block as an Intent.
Intent intent_of(const OrderedJson& quantization);
/// 8, 4 ... or 0: what a method means (SPECIFICATION A2).
int bits_of(std::string_view method);

}  // namespace bitwright
