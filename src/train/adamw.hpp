#pragma once

#include <torch/torch.h>

#include <span>
#include <vector>

namespace bitwright::train {

struct AdamWOptions {
  double lr = 3e-4, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
};

/// One step of AdamW (Loshchilov, Hutter 2019) on `count` neighbouring numbers, on all threads; `step` counts from 1:
///   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  with g = gradient_scale * gradient;
///   w = w (1 - lr decay) - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon).
/// Each number's bits depend on its own inputs alone.
void adamw_step(const AdamWOptions& options, int64_t step, double gradient_scale, const float* gradient, size_t count,
                float* weight, float* m, float* v);

/// AdamW over float32 tensors. What is public is what a checkpoint holds, or a process that has a part of it.
class AdamW {
 public:
  struct Parameter {
    torch::Tensor weight;  ///< contiguous float32
    torch::Tensor m, v;    ///< of its shape, from zeros
    int64_t step = 0;      ///< how many it has made
    size_t group = 0;
  };
  struct Group {
    AdamWOptions options;
  };

  /// A group of parameters with options of their own (no decay for norms).
  void add_group(const std::vector<torch::Tensor>& parameters, const AdamWOptions& options);

  /// One step of each parameter that has a gradient, which counts `gradient_scale` times (clipping, averages).
  void step(double gradient_scale = 1);
  void zero_grad();  ///< gradients become undefined

  std::vector<Group>& groups() { return groups_; }              ///< their lr changes with the schedule
  std::vector<Parameter>& parameters() { return parameters_; }  ///< in the order they came in

 private:
  std::vector<Group> groups_;
  std::vector<Parameter> parameters_;
};

/// The square root of the sum of the squares of all gradients, summed in double in a fixed order.
double gradient_norm(const std::vector<torch::Tensor>& parameters);

}  // namespace bitwright::train
