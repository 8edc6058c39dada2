#pragma once

#include <optional>
#include <string>

#include "bitwright/torch/ptq.hpp"
#include "kernels/activation.hpp"
#include "train/plan.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright::train {

/// A layer that does not learn, quantized as a checkpoint has it: what goes in and comes out is quantized too where its
/// QuantizedLinear says so. Gradients pass that straight through. Computes what the runtime computes.
class QuantizedLayer : public QuantizedLinearBehaviour {
 public:
  /// relative_error: of the weight; 0 where its floats are not known.
  /// compute: the type of the product, float32 or bfloat16; without one that of the input.
  explicit QuantizedLayer(QuantizedTensor weight, QuantizedLinear linear = {}, double relative_error = 0,
                          c10::optional<torch::ScalarType> compute = c10::nullopt);
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override;
  double relative_error() const { return relative_error_; }

 protected:
  torch::Tensor prepare(const torch::Tensor& input) override;

 private:
  std::optional<ActivationQuantizer> input_{}, output_{};
  double relative_error_;
  c10::optional<torch::ScalarType> compute_;
};

/// x: [..., features], of any type of floats; the result has its type. Straight-through gradient.
torch::Tensor quantize_activations(const torch::Tensor& x, const ActivationQuantizer& quantizer);

/// Throws Error{"already-quantized"} where a layer computes in another way than libtorch's.
void require_plain(const ModulePlan& plan);
/// The layers that have a scheme become QuantizedLayers. All weights are quantized before the first layer changes.
void quantize_layers(const ModulePlan& plan, c10::optional<torch::ScalarType> compute = c10::nullopt);

using bitwright::quantize_model_ptq;
/// The same as the public one, with the weights' schemes as a request has them (the section `quantization` of a file);
/// of `config` the fields that speak of inputs count.
QuantizationInfo quantize_model_ptq(torch::nn::Module& module, const PtqConfig& config, const ContainerRequest& request,
                                    const std::function<void()>& calibrate);

}  // namespace bitwright::train
