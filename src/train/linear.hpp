#pragma once

#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>

namespace bitwright::train {

/// What computes y = x Wᵀ + b in libtorch's place: a layer that is quantized, learns through fake quantization, or has
/// an adapter. Every torch::nn::Linear of every module can have one, whoever holds it and however its forward() is
/// written, because libtorch's own operations ask it.
class LinearBehaviour {
 public:
  LinearBehaviour() = default;
  LinearBehaviour(const LinearBehaviour&) = delete;
  LinearBehaviour& operator=(const LinearBehaviour&) = delete;
  virtual ~LinearBehaviour() = default;

  /// input: [..., in features], in any type (bfloat16 where autocast is on); bias: [out features] of the
  /// same type, or undefined.
  /// Returns [..., out features]. Called where autograd still records: what is returned has a history where the
  /// operations of libtorch (or a torch::autograd::Function) give it one. May be called from several threads at once.
  virtual torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) = 0;
  /// What it adds to: an adapter's frozen layer. Null: nothing, or plain floats.
  virtual const std::shared_ptr<LinearBehaviour>& base() const;
};

/// From now on `behaviour` computes this layer. `parameter` becomes the module's parameter "weight", which optimizers
/// see and files hold: the floats that learn, or packed codes. The member linear.weight, which forward() reads, becomes
/// a stand-in with the sizes and type of what it was and no numbers: all it can do is be multiplied with, by
/// linear(), or matmul() and addmm() of its t().
void attach(torch::nn::LinearImpl& linear, const std::shared_ptr<LinearBehaviour>& behaviour,
            const torch::Tensor& parameter);
/// libtorch computes the layer again, with `weight` as its parameter and its member.
void detach(torch::nn::LinearImpl& linear, const torch::Tensor& weight);
/// Null: libtorch computes it. A copy of a module (clone()) has no behaviours.
std::shared_ptr<LinearBehaviour> behaviour_of(const torch::nn::LinearImpl& linear);
/// The same if it is of this kind.
template <class Behaviour>
std::shared_ptr<Behaviour> behaviour_as(const torch::nn::LinearImpl& linear) {
  return std::dynamic_pointer_cast<Behaviour>(behaviour_of(linear));
}
/// The module's parameter "weight": of a layer without behaviour its weight.
torch::Tensor parameter_of(const torch::nn::LinearImpl& linear);

/// Calls use("model.layers.0.mlp.up_proj", layer) for each linear layer, in the order of registration. Layers that
/// belong to another linear layer (adapters) are left out.
void for_each_linear(const torch::nn::Module& module,
                     const std::function<void(const std::string& path, torch::nn::LinearImpl& linear)>& use);

}  // namespace bitwright::train
