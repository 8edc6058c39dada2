#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernel_level.hpp"
#include "kernels/packed_matrix.hpp"

namespace bitwright {

/// Keys and values of one layer in panels, so that the tiles of the matrix product serve attention too: scores run in
/// lanes over positions, weighted sums in lanes over the head.
class LayerCache {
 public:
  LayerCache(size_t kv_heads, size_t head_size, size_t capacity);
  size_t kv_heads() const { return kv_heads_; }
  size_t head_size() const { return head_size_; }
  size_t bytes() const { return (keys_.size() + values_.size()) * sizeof(CacheLine); }
  /// key, value: [kv_heads, head_size] of one token; position < capacity.
  void store(size_t position, const float* key, const float* value);

  const float* keys(size_t kv_head) const;    ///< [capacity / kPanel][head_size][kPanel positions]
  const float* values(size_t kv_head) const;  ///< [ceil(head_size / kPanel)][capacity][kPanel of the head]
  size_t key_panel() const { return head_size_ * kPanel; }
  size_t value_panel() const { return capacity_ * kPanel; }

 private:
  size_t kv_heads_, head_size_, capacity_;  // capacity_: a multiple of kPanel
  std::vector<CacheLine> keys_, values_;
};

struct AttentionRule {
  float scale;        ///< scores are multiplied by it
  float cap = 0;      ///< then become cap * tanh(score / cap); 0: left as they are
  size_t window = 0;  ///< a query sees this many positions, its own the last of them; 0: all before it
};

/// Causal attention of `tokens` queries, which stand at positions first, first + 1, … of `cache`, already stored.
/// q, out: [tokens, heads, head_size]; head h reads key-value head h / (heads / kv_heads). A query's result does not
/// depend on what else is in the call.
void attend(const float* q, size_t tokens, size_t first, size_t heads, const LayerCache& cache,
            const AttentionRule& rule, float* out, const KernelLevel& level = active_kernel_level());

}  // namespace bitwright
