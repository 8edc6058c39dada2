#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "container/container.hpp"
#include "kernels/compact_tensor.hpp"
#include "scheme/quantized_linear.hpp"
#include "train/linear.hpp"
#include "train/ops.hpp"

namespace bitwright::train {

/// y = x Wᵀ with gradients to x and none to W, which is decoded a tile at a time: there is never a float copy of it.
/// input: [..., columns], f32 or bfloat16, which is the type of the result too; f32 is multiplied in f32. weight:
/// [rows, columns], kept alive by the graph.
torch::Tensor multiply_quantized(const torch::Tensor& input, const std::shared_ptr<const CompactTensor>& weight);

/// A linear layer whose weight is quantized and does not learn. Its parameter "weight" is the packed codes (uint8, no
/// gradient, not a copy). A plain scheme (bfloat16) is a frozen float weight.
class QuantizedLinearBehaviour : public LinearBehaviour {
 public:
  /// weight: [out features, in features]. linear: what else a container says of the layer; kept, for whoever writes it.
  /// owner: whose way of rounding the weight has; null: as scheme/ defines it.
  explicit QuantizedLinearBehaviour(QuantizedTensor weight, QuantizedLinear linear = {},
                                    const Container* owner = nullptr);
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override;

  const std::shared_ptr<const CompactTensor>& weight() const { return weight_; }
  /// For the loss of a model whose head this is; none where a derived class does more than multiply.
  std::optional<FrozenHead> as_head() const;
  const Scheme& scheme() const { return weight_->scheme(); }
  const QuantizedLinear& linear() const { return linear_; }
  uint64_t bytes() const { return weight_->bytes(); }  ///< codes, scales and offsets
  torch::Tensor codes() const;                         ///< uint8: [out features, bytes a row], or one dimension
  torch::Tensor decoded() const;                       ///< f32 [out features, in features]
  /// Another weight of the same shape. The layer's parameter must be attached again.
  void set_weight(QuantizedTensor weight);
  void set_weight(std::shared_ptr<const CompactTensor> weight);
  /// Other floats, rounded to the weight's scheme as its owner does.
  QuantizedTensor requantized(const torch::Tensor& floats) const;

 protected:
  /// What is multiplied in the input's place: where activations are quantized too.
  virtual torch::Tensor prepare(const torch::Tensor& input) { return input; }

 private:
  std::shared_ptr<const CompactTensor> weight_;
  QuantizedLinear linear_;
  const Container* owner_;
};

/// All values: f32, of the tensor's shape.
torch::Tensor decoded(const QuantizedTensor& tensor);

/// The layer computes by `behaviour`, and its parameter is the codes.
void attach_quantized(torch::nn::LinearImpl& linear, const std::shared_ptr<QuantizedLinearBehaviour>& behaviour);

}  // namespace bitwright::train
