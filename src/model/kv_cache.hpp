#pragma once

#include <vector>

#include "kernels/attention.hpp"
#include "model/model.hpp"

namespace bitwright {

struct KvCache::Impl {
  std::vector<LayerCache> layers;
  int64_t length = 0, capacity = 0;

  // cos and sin of position * theta^(-2 i / head_size): [positions][half] for as many as were needed so far.
  size_t half = 0;
  double theta = 0;
  std::vector<float> cosine{}, sine{};
  void prepare_positions(int64_t count);
};

}  // namespace bitwright
