#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "bitwright/json.hpp"

namespace bitwright {

/// How quantize_model_ptq() quantizes. What is left out follows from the bits, as on the command line: 8 bits are
/// symmetric with a scale a row, fewer have groups of 64 with zero points.
struct PtqConfig {
  std::string type = "static";     ///< of the layers' inputs: static, dynamic (a scale a token), or weight_only
  int64_t bits = 8;                ///< of the weights: 8, 4, 3, 2
  std::string quant_type = "int";  ///< or e4m3, e5m2 (inputs in e4m3 then), nf4, fp4
  std::optional<std::string> granularity{};  ///< of the weights: tensor, channel (a row), group
  std::optional<int64_t> group_size{};
  std::optional<bool> symmetric{};  ///< false: with zero points
  std::string format = "native";    ///< the container in whose schemes, as `bitwright formats` names it

  // The inputs, 8 bits each.
  bool symmetric_inputs = true;     ///< false: static ones have a zero point
  std::string observer = "minmax";  ///< of static: minmax, moving_average or percentile
  double averaging = 0.01;          ///< moving_average: weight of the newest batch
  double percentile = 99.99;        ///< percentile: of the values

  std::vector<std::string> skip_modules{};            ///< none: the head is quantized, too
  OrderedJson layer_configs = OrderedJson::object();  ///< glob or part of a path -> settings, as in `quantize`
};

/// One linear layer.
struct LayerInfo {
  std::string path;
  std::string scheme{};       ///< of the weight: "int8 symmetric, per channel, float32 scales"; empty: floats
  std::string inputs{};       ///< of what it is multiplied with; empty: floats
  int64_t bits = 0;           ///< of a weight's code; 0: floats
  int64_t parameters = 0;     ///< weights
  uint64_t bytes = 0;         ///< what they take in memory
  double relative_error = 0;  ///< |w - quantized| / |w|; 0 where it is not known
};
struct QuantizationInfo {
  int64_t bits = 0;                              ///< of most weights; 0: nothing is quantized
  std::string mode = "none";                     ///< none, weight_only, dynamic, static, qat
  std::vector<LayerInfo> affected{}, skipped{};  ///< the layers in order
  uint64_t bytes = 0, float_bytes = 0;           ///< of all layers' weights, as they are and in float32
  std::vector<std::string> warnings{};           ///< of what was asked for
};
OrderedJson to_json(const QuantizationInfo& info);

/// Quantizes the linear layers of any module in place, without training: their parameter "weight" becomes packed codes,
/// their floats are freed, forward() stays as it is. `calibrate` runs the module over data that is like what it will
/// see; needed for static, where the range of each layer's inputs is fixed by it.
/// Throws Error: "needs-calibration" for static without data (or a layer that no data reached), "already-quantized",
/// "bad-value" (exit status 2), "nothing-to-quantize", "not-finite". The module is then as it was.
QuantizationInfo quantize_model_ptq(torch::nn::Module& module, const PtqConfig& config = {},
                                    const std::function<void()>& calibrate = {});
/// The same, calibrated by module.forward(batch) for each batch.
template <class Model>
QuantizationInfo quantize_model_ptq(Model& module, const PtqConfig& config, const std::vector<torch::Tensor>& batches) {
  std::function<void()> calibrate;
  if (!batches.empty())
    calibrate = [&] {
      for (const torch::Tensor& batch : batches) module.forward(batch);
    };
  return quantize_model_ptq(static_cast<torch::nn::Module&>(module), config, calibrate);
}

/// Plain float32 layers again, without quantization parameters: what their codes stand for, and of layers with fake
/// quantization the floats that learned.
void dequantize_model(torch::nn::Module& module);

QuantizationInfo get_quantization_info(const torch::nn::Module& module);
/// Has it a layer whose weight is codes?
bool is_model_quantized(const torch::nn::Module& module);
/// How far outputs are from those of the model in full precision.
struct OutputDifference {
  double relative = 0;  ///< |difference| / |reference|, Euclidean
  double cosine = 1;
  double largest = 0;  ///< absolute
};
OutputDifference compare_outputs(const torch::Tensor& reference, const torch::Tensor& outputs);

}  // namespace bitwright
