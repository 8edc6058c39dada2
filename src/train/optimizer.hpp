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

/// A parameter that learns, by the name that checkpoints have for it.
struct NamedParameter {
  std::string name;
  torch::Tensor tensor;  ///< contiguous float32
  bool decays = true;    ///< matrices: norms, biases and learned scales are not drawn to zero
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
  std::vector<NamedParameter> parameters_;  ///< those that decay first
};

/// name: "adamw", "adamw8bit". options.weight_decay: of those that decay.
std::unique_ptr<Optimizer> make_optimizer(std::string_view name, std::vector<NamedParameter> parameters,
                                          const AdamWOptions& options);

}  // namespace bitwright::train
