#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bitwright/json.hpp"

namespace bitwright {

/// How one of the libraries' methods quantizes the linear layers of a model (SPECIFICATION D1).
struct QuantizationConfig {
  std::string method = "none";  ///< bnb_nf4, bnb_int8, hqq, mlx_int4, mlx_int8, quanto_int2, _int4, _int8, none
  int64_t bits = 0;             ///< 0: the method's own; of hqq 4
  /// Of hqq, MLX and bnb_nf4. LLM.int8 has rows, Quanto chooses by the row's length what its loader expects.
  int64_t group_size = 64;
  std::string compute_dtype = "bfloat16";  ///< of the products: float32, bfloat16 or float16
  std::string storage_dtype = "uint8";     ///< what packed codes are labelled as in files
  bool double_quant = true;                ///< bnb_nf4: the scales are quantized, too
  std::string quant_type = "nf4";          ///< bnb_nf4: or "fp4"
  std::vector<std::string> skip_modules = {"lm_head"};
  /// Glob or part of a path -> {"bits", "group_size", "quant_type", "double_quant", "method"}; the first that matches.
  /// A method of the same library, or "none".
  OrderedJson layer_configs = OrderedJson::object();
  OrderedJson backend_options = OrderedJson::object();  ///< handed to adapters of users; ours know none

  bool operator==(const QuantizationConfig&) const = default;
};

/// All members, in the order above; `bits` only where it is given.
OrderedJson to_json(const QuantizationConfig& config);
/// Members that are missing have their defaults. Throws Error (exit status 2) for what is unknown or of a wrong form.
QuantizationConfig quantization_config_from_json(const OrderedJson& json);

}  // namespace bitwright
