#pragma once

#include <torch/torch.h>

#include <memory>
#include <mutex>
#include <string_view>

#include "scheme/quantized_tensor.hpp"

namespace bitwright::train {

/// How the range of activations is found while batches pass.
enum class RangeEstimate : uint8_t {
  minmax,          ///< the smallest and largest value ever
  moving_average,  ///< of each batch's extremes: PyTorch's MovingAverageMinMaxObserver
  percentile,      ///< what a share of all values lies within
};

struct ObserverSettings {
  RangeEstimate estimate = RangeEstimate::moving_average;
  double averaging = 0.01;    ///< moving_average: weight of the newest batch, 0 < averaging <= 1
  double percentile = 99.99;  ///< of the values, half of the rest beyond either end; 50 < percentile <= 100
};
/// Throws Error{"bad-value"} (exit status 2) for numbers outside the limits above.
void check(const ObserverSettings& settings);

/// Finds a range. May be shared between threads.
class Observer {
 public:
  /// Throws as check().
  explicit Observer(const ObserverSettings& settings);

  /// values: floats of any type and shape. NaN and infinities throw Error{"not-finite"}; no values and a frozen
  /// observer change nothing.
  void update(const torch::Tensor& values);
  bool has_data() const;
  /// Throws Error{"no-data"} before the first update().
  Range range() const;

  void freeze(bool frozen = true);
  bool is_frozen() const;

  /// All there is to keep, as one tensor of doubles that update() and freeze() write to: registered as a buffer it is
  /// in checkpoints, and what is copied into it is what the observer goes on from. Percentiles do not depend on the
  /// order of batches.
  const torch::Tensor& state() const { return state_; }

 private:
  void update_histogram(const float* values, int64_t count, double largest);
  Range percentile_range() const;
  double* numbers() const;

  ObserverSettings settings_;
  torch::Tensor state_;
  mutable std::mutex mutex_;
};

}  // namespace bitwright::train
