#pragma once

#include <torch/torch.h>

#include <string>
#include <vector>

#include "bitwright/torch/quantization_config.hpp"
#include "recipe/recipe.hpp"

namespace bitwright::train {

/// What becomes of one linear layer.
struct LayerPlan {
  std::string path;              ///< "model.layers.0.mlp.up_proj"; empty: the module is itself a linear layer
  torch::nn::LinearImpl* layer;  ///< the module's
  TensorPlan plan;               ///< of path + ".weight"; without a scheme the layer is kept, for plan.reason
};

struct ModulePlan {
  std::vector<LayerPlan> layers;  ///< in the order of registration
  OrderedJson settings;           ///< the request with every default filled in
  std::vector<Warning> warnings;
};

/// Which scheme each linear layer of a module gets: what resolve() makes of its paths, shapes and types. A layer whose
/// shape the container cannot hold is kept, with a warning. Layers may have behaviours already.
/// Throws Error as resolve() does; a request with method "none" and no rules keeps all.
ModulePlan plan_module(const torch::nn::Module& module, const QuantizationRequest& request,
                       const Container* container = nullptr);

/// A request, and the container in whose schemes it is meant.
struct ContainerRequest {
  QuantizationRequest request;
  const Container* container = nullptr;
};
/// Throws Error (exit status 2) for an unknown method, and where layers need another library's method.
ContainerRequest request_of(const QuantizationConfig& config);

/// The floats of a layer as its plan stores them. weight: [out features, in features] of any type of floats on the
/// CPU. Needs plan.scheme. Throws what Algorithm::quantize throws.
QuantizedTensor quantize_weight(const TensorPlan& plan, const torch::Tensor& weight);

/// f16, bf16, f32; anything else is taken as f32.
DType dtype_of(torch::ScalarType type);
torch::ScalarType scalar_type_of(DType dtype);

/// The name that a layer's weight has in a checkpoint: path + ".weight".
std::string weight_name(const std::string& path);

}  // namespace bitwright::train
