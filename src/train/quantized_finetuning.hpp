#pragma once

#include <memory>

#include "bitwright/torch/finetuning.hpp"
#include "kernels/requantize.hpp"
#include "train/adamw8.hpp"
#include "train/plan.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright::train {

/// A linear layer whose quantized weight learns: backward() gives a gradient to its input, as a frozen one does, and
/// makes the weight's own, which waits here until it is learned from.
class LearningLinear : public QuantizedLinearBehaviour, public std::enable_shared_from_this<LearningLinear> {
 public:
  /// Called by backward() when all uses of the layer in a graph have added to the gradient. Null: nothing happens.
  using WhenComplete = std::function<void(LearningLinear& layer)>;

  LearningLinear(std::string path, QuantizedTensor weight, QuantizedLinear linear, torch::ScalarType gradient_type);
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override;

  const std::string& path() const { return path_; }
  torch::Tensor& gradient() { return gradient_; }  ///< [out features, in features]; undefined: none yet
  void when_complete(WhenComplete call) { when_complete_ = std::move(call); }

 private:
  struct Tap;
  struct Use;
  void add_gradient(const torch::Tensor& input, const torch::Tensor& output_gradient);

  std::string path_;
  torch::ScalarType gradient_type_;
  torch::Tensor gradient_{};
  torch::Tensor anchor_;        ///< an input that wants a gradient, so that backward() comes here
  std::shared_ptr<char> uses_;  ///< one owner more for each use in a graph that backward() has not reached
  WhenComplete when_complete_{};
};

/// The same as the public one, with schemes as a request has them (the section `quantization` of a file).
std::shared_ptr<QuantizedFinetuning> enable_quantized_finetuning(torch::nn::Module& module,
                                                                 const QuantizedFinetuningConfig& config,
                                                                 const ContainerRequest& request);

}  // namespace bitwright::train
