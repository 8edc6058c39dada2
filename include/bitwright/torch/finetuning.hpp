#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace bitwright {

/// What becomes of the part of an update that the grid of the codes cannot hold.
enum class Requantization : uint8_t {
  stochastic,         ///< a code goes up with the probability that is the fraction: right on average, no memory
  error_compensated,  ///< codes to nearest; the rest is kept in 8 bits and added before the next update
};

struct QuantizedFinetuningConfig {
  int bits = 8;                         ///< 8 or 4; of layers that are quantized already their own scheme stays
  std::string granularity = "channel";  ///< tensor, channel (one scale a row) or group
  int64_t group_size = 64;              ///< for granularity group, along the rows
  bool symmetric = true;                ///< false: codes with a zero point a group
  Requantization requantization = Requantization::stochastic;
  /// Embeddings and heads that share a matrix stay in floats whatever this says. Components of paths: "lm_head".
  std::vector<std::string> skip_modules{};

  // AdamW of the quantized matrices.
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0;
  bool eight_bit_optimizer = true;  ///< moments in 8 bits, blocks of 256; false: in floats
  /// A layer is updated as soon as backward() has its gradient, which is then freed: no gradient outlives its layer.
  /// Needs one backward() a step, and set_learning_rate() before it; gradients cannot be clipped or averaged then.
  bool update_in_backward = false;
  torch::ScalarType gradient_type = torch::kBFloat16;  ///< in which gradients accumulate: kBFloat16 or kFloat32
  uint64_t seed = 0;
};

/// The quantized matrices of a module that learns, and what makes them learn. Codes and scales are the only weights
/// there are; every step ends with them. All else of the module (biases, norms, embeddings) learns by any optimizer.
class QuantizedFinetuning {
 public:
  QuantizedFinetuning() = default;
  QuantizedFinetuning(const QuantizedFinetuning&) = delete;
  QuantizedFinetuning& operator=(const QuantizedFinetuning&) = delete;
  virtual ~QuantizedFinetuning() = default;

  virtual std::vector<std::string> layers() const = 0;  ///< paths of the quantized layers
  /// What backward() accumulated, one tensor a layer that has one: to be scaled in place (clipping) or averaged over
  /// processes before step(). Empty with update_in_backward.
  virtual std::vector<torch::Tensor> gradients() = 0;
  virtual void zero_grad() = 0;
  virtual void set_learning_rate(double rate) = 0;
  /// Updates and quantizes every layer that has a gradient, and frees the gradients. With update_in_backward it only
  /// counts the step. Throws Error{"gradient-not-finite"} with the layer's name before any weight is touched.
  virtual void step() = 0;

  /// All that resuming needs, by name ("PATH.codes" and more); load_state(state()) changes nothing. The tensors are
  /// copies. Throws Error{"incompatible-state"} where names, types or sizes differ, before anything is changed.
  virtual std::map<std::string, torch::Tensor> state() const = 0;
  virtual void load_state(const std::map<std::string, torch::Tensor>& state) = 0;

  struct Sizes {
    int64_t elements = 0, quantized_bytes = 0;        ///< codes, scales and zero points
    int64_t residual_bytes = 0, optimizer_bytes = 0;  ///< errors kept; both moments
    int64_t gradient_bytes = 0;                       ///< held now
  };
  virtual Sizes sizes() const = 0;
  /// update_in_backward: there are no gradients to accumulate, clip or average over processes.
  virtual bool updates_in_backward() const = 0;
};

/// From now on the linear layers of `module` are quantized and learn: floats are quantized first, what is quantized in
/// integers stays as it is. The result must live as long as the module learns.
/// Throws Error{"bad-config"} for what is out of range, Error{"nothing-to-quantize"} if no layer is left,
/// Error{"not-trainable"} for layers in schemes without a grid of steps (nf4, fp8 …).
std::shared_ptr<QuantizedFinetuning> enable_quantized_finetuning(torch::nn::Module& module,
                                                                 const QuantizedFinetuningConfig& config = {});

}  // namespace bitwright
