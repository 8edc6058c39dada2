#pragma once

#include <torch/torch.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bitwright/json.hpp"

namespace bitwright {

/// How a model learns with quantization in its forward pass. The gradients go straight through (SPECIFICATION C2).
struct QatConfig {
  /// The section `quantization` of a configuration file, as `bitwright quantize` has it: method, scheme, skip_modules,
  /// layer_configs … Without skip_modules every linear layer is quantized.
  OrderedJson quantization = {{"method", "int8"}};
  std::string format = "native";  ///< the container in whose schemes, as `bitwright formats` names it

  /// Of weights. learned: step sizes and zero points are parameters (LSQ; integers with plain scales); computed: from
  /// the weights at each step, as quantization after training would; auto: learned where it can be.
  std::string scales = "auto";
  /// Where learned ones begin. search: least squared error; lsq: 2 mean|w| / sqrt(Qp), as in the paper.
  std::string initial_scales = "search";

  /// Of the layers' inputs. none; dynamic: a scale a token, from its values; static: one for all; auto: as
  /// `quantization` says.
  std::string activations = "auto";
  std::string activation_type = "int8";  ///< int8, int4, e4m3, e5m2
  bool symmetric_activations = true;     ///< false: with zero points (integers)
  /// Of static ones: minmax, moving_average, percentile: observed in training mode; learned: parameters (LSQ).
  std::string activation_ranges = "moving_average";
  double averaging = 0.01;    ///< moving_average: weight of the newest batch
  double percentile = 99.99;  ///< percentile: of the values
};

/// What became of a model's linear layers.
struct QatLayers {
  std::vector<std::string> quantized{}, kept{};  ///< paths
  std::vector<std::string> warnings{};           ///< of what was asked for
  OrderedJson settings{};                        ///< `quantization` with every default filled in
};

/// Linear layers compute with fake-quantized weights from now on. Their floats stay the parameter "weight"; what else
/// learns is beside it ("weight_scale", "weight_zero", "input_scale", "input_zero"), and so are observed ranges (the
/// buffer "input_range"): optimizers and checkpoints have them all. Create the optimizer afterwards.
/// Throws Error: "already-quantized", "bad-value" (exit status 2), "nothing-to-quantize". The module is then as it was.
QatLayers prepare_model_for_qat(torch::nn::Module& module, const QatConfig& config = {});

/// Quantized for good: each such layer's parameter "weight" becomes codes, with exactly the scales that were learned,
/// so that the outputs stay those of the model in evaluation mode. Returns how many layers.
/// Throws Error "no-data" where the range of static activations is not known, "not-qat" where no layer learns so.
int64_t convert_qat_model(torch::nn::Module& module);

/// Has it a layer that computes with fake quantization?
bool is_qat_model(const torch::nn::Module& module);

}  // namespace bitwright
