#pragma once

#include "train/fake_quantize.hpp"
#include "train/linear.hpp"
#include "train/observer.hpp"
#include "train/plan.hpp"

namespace bitwright::train {

/// How the inputs of a layer are quantized while it learns.
struct InputQuantization {
  enum class Scales : uint8_t { none, dynamic, observed, learned };
  Scales scales = Scales::none;
  Scheme scheme{};  ///< of observed and learned ones: one group
  ObserverSettings observer{};
};

/// A layer that computes with fake-quantized weights and inputs.
class FakeQuantizedLinear : public LinearBehaviour {
 public:
  enum class Start : uint8_t { search, lsq };
  /// layer: outlives it and has no behaviour.
  /// plan: with a scheme; learned_scales needs an integer_grid() of it.
  FakeQuantizedLinear(torch::nn::LinearImpl& layer, TensorPlan plan, bool learned_scales, Start start,
                      InputQuantization input);
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override;

  const Scheme& scheme() const { return *plan_.scheme; }
  const torch::Tensor& floats() const { return weight_; }                   ///< that learn
  torch::Tensor fake_weight(torch::ScalarType type = torch::kFloat) const;  ///< that are multiplied
  /// The codes that fake_weight() stands for.
  QuantizedTensor quantized() const;
  /// What it does to its inputs. Throws Error{"no-data"}.
  QuantizedLinear linear() const;
  /// Parameters weight_scale, weight_zero, input_scale, input_zero (f32) and the buffer input_range (doubles), as far
  /// as it has them.
  const std::shared_ptr<torch::nn::Module>& learned() const { return learned_; }

 private:
  void start_weight(Start start);
  void start_input();
  torch::Tensor quantize_input(const torch::Tensor& x);
  ActivationScheme fixed_input() const;
  ActivationScheme learned_input() const;
  torch::Tensor input_scale() const { return stored_scale(input_scale_, DType::f32); }

  torch::nn::LinearImpl& layer_;
  TensorPlan plan_;
  InputQuantization input_;
  torch::Tensor weight_{}, scale_{}, zero_{}, input_scale_{}, input_zero_{};
  std::unique_ptr<Observer> observer_{};
  std::shared_ptr<torch::nn::Module> learned_ = std::make_shared<torch::nn::Module>("fake_quantize");
};

/// Is this parameter of a module, named as named_parameters() does, a scale or zero point that learned() holds?
bool is_learned_scale(std::string_view name);

/// The layer learns so from now on; learned() is its module "fake_quantize".
void attach_fake_quantized(torch::nn::LinearImpl& layer, const std::shared_ptr<FakeQuantizedLinear>& behaviour);
/// libtorch computes the layer again, with the floats that learned; nothing is registered beside them.
void detach_fake_quantized(torch::nn::LinearImpl& layer);

}  // namespace bitwright::train
