#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "train/adamw.hpp"

namespace bitwright::train {

/// How a parameter is stepped.
enum class Treatment : uint8_t {
  matrix,  ///< decays
  vector,  ///< norms, biases: not drawn to zero
  scale,   ///< scales and zero points that QAT learns: likewise, at a learning rate of their own
};
/// name: as checkpoints have it.
Treatment treatment_of(std::string_view name, const torch::Tensor& parameter);

/// A parameter that learns, by the name that checkpoints have for it.
struct NamedParameter {
  std::string name;
  torch::Tensor tensor;  ///< contiguous float32
  Treatment treatment = Treatment::matrix;
};

/// One of the optimizers a configuration can name, with its parameters.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// Of each parameter that has a gradient, which counts `gradient_scale` times.
  virtual void step(double learning_rate, double gradient_scale) = 0;
  virtual void zero_grad() = 0;
  /// All tensors that resuming needs, by name; what is copied into them is what it goes on from.
  virtual std::map<std::string, torch::Tensor> state() = 0;
  /// How many steps each parameter has made; likewise.
  virtual std::map<std::string, int64_t*> steps() = 0;

  const std::vector<NamedParameter>& parameters() const { return parameters_; }

 protected:
  explicit Optimizer(std::vector<NamedParameter> parameters) : parameters_(std::move(parameters)) {}
  std::vector<NamedParameter> parameters_;  ///< in the order of their treatment
};

/// name: "adamw", "adamw8bit". options.weight_decay: of matrices. scale_rate: of scales, times the learning rate.
std::unique_ptr<Optimizer> make_optimizer(std::string_view name, std::vector<NamedParameter> parameters,
                                          const AdamWOptions& options, double scale_rate = 1);

}  // namespace bitwright::train
