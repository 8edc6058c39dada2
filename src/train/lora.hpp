#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bitwright/torch/lora.hpp"
#include "recipe/recipe.hpp"
#include "train/linear.hpp"

namespace bitwright::train {

/// A frozen linear layer with an adapter: base(x) + scaling B A dropout(x), in the type of x.
class LoraBehaviour : public LinearBehaviour {
 public:
  /// base: null where the layer is floats; then weight is. a: [r, in features], b: [out features, r] f32.
  LoraBehaviour(std::shared_ptr<LinearBehaviour> base, torch::Tensor weight, torch::nn::Linear a, torch::nn::Linear b,
                const LoraConfig& config);
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override;

  const std::shared_ptr<LinearBehaviour>& base() const override { return base_; }
  const torch::Tensor& weight() const { return weight_; }  ///< undefined where there is a base
  const torch::nn::Linear& a() const { return a_; }
  const torch::nn::Linear& b() const { return b_; }
  torch::Tensor change() const;  ///< scaling B A: f32 [out features, in features]

 private:
  std::shared_ptr<LinearBehaviour> base_;
  torch::Tensor weight_;
  torch::nn::Linear a_, b_;
  double scaling_, dropout_;
};

/// The weight with its change, in f32 or the type of a float base. Throws Error{"no-adapter"} where the base is neither
/// floats nor a frozen quantized weight.
torch::Tensor merged_weight(const LoraBehaviour& lora);

/// A layer with its adapter.
struct AdaptedLayer {
  std::string path;
  torch::nn::LinearImpl* layer;
  std::shared_ptr<LoraBehaviour> lora;
};
std::vector<AdaptedLayer> adapted_layers(const torch::nn::Module& model);

/// bitwright::prepare_qlora with the base as a recipe has it: the section `quantization` of a configuration.
std::vector<std::string> prepare_qlora(torch::nn::Module& model, const LoraConfig& config,
                                       const QuantizationRequest& request, const Container* container);

/// Does a target of LoraConfig mean this layer?
bool is_target(const std::string& target, const std::string& path);

}  // namespace bitwright::train
