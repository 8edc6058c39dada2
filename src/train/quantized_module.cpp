#include "train/quantized_module.hpp"

#include <cmath>

#include "base/error.hpp"
#include "kernels/decode.hpp"
#include "train/linear.hpp"
#include "train/ops.hpp"

namespace bitwright::train {
namespace {

std::optional<ActivationQuantizer> quantizer_of(const std::optional<ActivationScheme>& activation) {
  if (!activation || !ActivationQuantizer::supports(*activation)) return std::nullopt;
  return ActivationQuantizer(*activation);
}

struct StraightThrough : torch::autograd::Function<StraightThrough> {
  static torch::Tensor forward(torch::autograd::AutogradContext*, const torch::Tensor& x,
                               const ActivationQuantizer& quantizer) {
    const torch::Tensor in = x.to(torch::kCPU, torch::kFloat).contiguous(), out = torch::empty_like(in);
    const int64_t columns = x.size(-1);
    if (in.numel() > 0)
      quantizer.apply(in.data_ptr<float>(), static_cast<size_t>(in.numel() / columns), static_cast<size_t>(columns),
                      out.data_ptr<float>());
    return out.to(x.device(), x.scalar_type());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& gradients) {
    return {gradients[0], torch::Tensor()};
  }
};

std::shared_ptr<QuantizedLayer> quantized_layer(const LayerPlan& layer, c10::optional<torch::ScalarType> compute) {
  const torch::Tensor floats = layer.layer->weight.detach().to(torch::kCPU, torch::kFloat).contiguous();
  QuantizedTensor codes = quantize_weight(layer.plan, layer.layer->weight);
  const double error = relative_error(
      {.dtype = DType::f32, .bytes = {static_cast<const std::byte*>(floats.data_ptr()), floats.nbytes()}}, codes);
  return std::make_shared<QuantizedLayer>(std::move(codes), layer.plan.linear, error, compute);
}

}  // namespace

torch::Tensor quantize_activations(const torch::Tensor& x, const ActivationQuantizer& quantizer) {
  return StraightThrough::apply(x, quantizer);
}

QuantizedLayer::QuantizedLayer(QuantizedTensor weight, QuantizedLinear linear, double relative_error,
                               c10::optional<torch::ScalarType> compute)
    : QuantizedLinearBehaviour(std::move(weight), std::move(linear)),
      input_(quantizer_of(this->linear().input)),
      output_(quantizer_of(this->linear().output)),
      relative_error_(relative_error),
      compute_(compute) {}

torch::Tensor QuantizedLayer::prepare(const torch::Tensor& input) {
  return input_ ? quantize_activations(input, *input_) : input;
}

torch::Tensor QuantizedLayer::forward(const torch::Tensor& input, const torch::Tensor& bias) {
  const torch::ScalarType type = compute_.value_or(input.scalar_type());
  torch::Tensor y;
  if (input_ && type == torch::kFloat32)  // the product that fake quantization learned with: another order of its sums
    y = train::linear(prepare(input.to(type)), decoded(), bias.defined() ? bias.to(type) : bias,
                      Compute::f32);  // would move codes of the next layer
  else
    y = QuantizedLinearBehaviour::forward(input.to(type), bias.defined() ? bias.to(type) : bias);
  y = y.to(input.scalar_type());
  return output_ ? quantize_activations(y, *output_) : y;
}

void require_plain(const ModulePlan& plan) {
  for (const LayerPlan& layer : plan.layers)
    if (behaviour_of(*layer.layer) != nullptr)
      throw Error({.code = "already-quantized",
                   .what = "cannot quantize",
                   .where = layer.path,
                   .why = "the layer is quantized, learns through fake quantization or has an adapter",
                   .fix = "call dequantize_model() first"});
}

void quantize_layers(const ModulePlan& plan, c10::optional<torch::ScalarType> compute) {
  require_plain(plan);
  std::vector<std::shared_ptr<QuantizedLayer>> quantized;
  for (const LayerPlan& layer : plan.layers)
    quantized.push_back(layer.plan.scheme ? quantized_layer(layer, compute) : nullptr);
  for (size_t i = 0; i < quantized.size(); ++i)
    if (quantized[i] != nullptr) attach_quantized(*plan.layers[i].layer, quantized[i]);
}

}  // namespace bitwright::train
