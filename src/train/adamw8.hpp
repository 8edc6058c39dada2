#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/blockwise_adamw.hpp"
#include "train/adamw.hpp"

namespace bitwright::train {

/// Both moments of an array, in 8 bits (kernels/blockwise_adamw.hpp) or in floats. What is public is what a checkpoint
/// holds.
struct Moments {
  torch::Tensor first, second;              ///< uint8 or float32, [count]; zeros at first
  torch::Tensor first_scale, second_scale;  ///< float32, one a block of 256; undefined where moments are floats

  Moments() = default;
  Moments(int64_t count, bool eight_bit);
  int64_t bytes() const;
  /// change: the gradient; becomes what the step adds to the weights, decay left out. On all threads; the numbers do
  /// not depend on how many.
  void update(const AdamWStep& step, std::span<float> change);
};

/// AdamW over float32 tensors with moments in 8 bits: a quarter of AdamW's memory. Arrays of less than 4096 elements
/// (norms, biases) have theirs in floats, as bitsandbytes has it. Otherwise as AdamW.
class AdamW8 {
 public:
  static constexpr int64_t kLeastElements = 4096;
  struct Parameter {
    torch::Tensor weight;  ///< contiguous float32
    Moments moments{};
    int64_t step = 0;  ///< how many it has made
    size_t group = 0;
  };

  /// A group of parameters with options of their own (no decay for norms).
  void add_group(const std::vector<torch::Tensor>& parameters, const AdamWOptions& options);

  /// One step of each parameter that has a gradient, which counts `gradient_scale` times (clipping, averages).
  void step(double gradient_scale = 1);
  void zero_grad();  ///< gradients become undefined

  std::vector<AdamW::Group>& groups() { return groups_; }       ///< their lr changes with the schedule
  std::vector<Parameter>& parameters() { return parameters_; }  ///< in the order they came in

 private:
  std::vector<AdamW::Group> groups_;
  std::vector<Parameter> parameters_;
};

}  // namespace bitwright::train
