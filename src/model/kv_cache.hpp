#pragma once

#include <span>
#include <vector>

#include "kernels/attention.hpp"
#include "model/model.hpp"

namespace bitwright {

/// Cosines and sines of one Rope, for as many positions as were needed so far.
class Rotation {
 public:
  /// length: of the sequences that it will serve.
  Rotation(const Rope& rope, int64_t length);
  void prepare(size_t positions);
  /// Turns the heads of x, `width` numbers together; position < what was prepared.
  void turn(size_t position, float* x, size_t width, size_t head_size) const;
  std::span<const float> cosine() const { return cosine_; }  ///< [positions prepared][pairs]
  std::span<const float> sine() const { return sine_; }

 private:
  std::vector<double> frequencies_;
  double magnitude_;
  std::vector<float> cosine_{}, sine_{};  ///< [positions][frequencies]
};

struct KvCache::Impl {
  std::vector<LayerCache> layers;
  std::vector<Rotation> rotations{};  ///< as ModelConfig::ropes
  int64_t length = 0, capacity = 0;
};

}  // namespace bitwright
