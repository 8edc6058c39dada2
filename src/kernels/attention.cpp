#include "kernels/attention.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kRows = 6;  // as the tiles have them

size_t panels(size_t n) { return (n + kPanel - 1) / kPanel; }

/// Up to kRows queries that read one key-value head; row r sees positions [0, first_limit + r * limit_step).
struct Rows {
  const float* q;
  float* out;
  size_t stride;  ///< of q and out
  size_t count, first_limit, limit_step;
  size_t limit(size_t row) const { return first_limit + row * limit_step; }
};

void attend_rows(const Rows& rows, const LayerCache& cache, size_t kv_head, const KernelLevel& level) {
  const size_t head_size = cache.head_size(), longest = rows.limit(rows.count - 1);
  std::vector<float> scores(rows.count * longest);
  level.multiply_tile({.x = rows.q,
                       .x_stride = rows.stride,
                       .w = cache.keys(kv_head),
                       .w_stride = cache.key_panel(),
                       .y = scores.data(),
                       .y_stride = longest,
                       .rows = rows.count,
                       .depth = head_size,
                       .columns = longest,
                       .add = false});
  float reciprocal[kRows];
  for (size_t r = 0; r < rows.count; ++r)
    reciprocal[r] =
        level.softmax_terms(scores.data() + r * longest, rows.limit(r), 1 / std::sqrt(static_cast<float>(head_size)));
  Tile sums = {.x = scores.data(),
               .x_stride = longest,
               .w = cache.values(kv_head),
               .w_stride = cache.value_panel(),
               .y = rows.out,
               .y_stride = rows.stride,
               .rows = rows.count,
               .depth = rows.first_limit,
               .columns = head_size,
               .add = false};
  level.multiply_tile(sums);
  // The positions that only later rows see.
  sums.rows = 1;
  sums.add = true;
  sums.w += rows.first_limit * kPanel;
  for (size_t r = 0; r < rows.count; ++r) {
    sums.x = scores.data() + r * longest + rows.first_limit;
    sums.y = rows.out + r * rows.stride;
    sums.depth = rows.limit(r) - rows.first_limit;
    if (sums.depth > 0) level.multiply_tile(sums);
    for (size_t i = 0; i < head_size; ++i) sums.y[i] *= reciprocal[r];
  }
}

}  // namespace

LayerCache::LayerCache(size_t kv_heads, size_t head_size, size_t capacity)
    : kv_heads_(kv_heads),
      head_size_(head_size),
      capacity_(panels(capacity) * kPanel),
      keys_(kv_heads * capacity_ * head_size / kPanel),
      values_(kv_heads * panels(head_size) * capacity_) {
  static_assert(sizeof(CacheLine) == kPanel * sizeof(float));
}

const float* LayerCache::keys(size_t kv_head) const {
  return reinterpret_cast<const float*>(keys_.data()) + kv_head * capacity_ * head_size_;
}

const float* LayerCache::values(size_t kv_head) const {
  return reinterpret_cast<const float*>(values_.data()) + kv_head * panels(head_size_) * value_panel();
}

void LayerCache::store(size_t position, const float* key, const float* value) {
  BW_ASSERT(position < capacity_);
  auto* const keys_begin = reinterpret_cast<float*>(keys_.data());
  auto* const values_begin = reinterpret_cast<float*>(values_.data());
  for (size_t head = 0; head < kv_heads_; ++head) {
    float* const k = keys_begin + head * capacity_ * head_size_ + position / kPanel * key_panel() + position % kPanel;
    float* const v = values_begin + head * panels(head_size_) * value_panel() + position * kPanel;
    for (size_t i = 0; i < head_size_; ++i) {
      k[i * kPanel] = key[head * head_size_ + i];
      v[i / kPanel * value_panel() + i % kPanel] = value[head * head_size_ + i];
    }
  }
}

void attend(const float* q, size_t tokens, size_t first, size_t heads, const LayerCache& cache, float* out,
            const KernelLevel& level) {
  const size_t head_size = cache.head_size(), shared = heads / cache.kv_heads(), width = heads * head_size;
  BW_ASSERT(shared * cache.kv_heads() == heads);
  if (tokens == 1) {  // rows are the heads that share keys
    const size_t blocks = (shared + kRows - 1) / kRows;
    parallel_for(cache.kv_heads() * blocks, [&](size_t task) {
      const size_t kv_head = task / blocks, begin = task % blocks * kRows;
      const size_t at = (kv_head * shared + begin) * head_size;
      attend_rows({.q = q + at,
                   .out = out + at,
                   .stride = head_size,
                   .count = std::min(kRows, shared - begin),
                   .first_limit = first + 1,
                   .limit_step = 0},
                  cache, kv_head, level);
    });
    return;
  }
  const size_t blocks = (tokens + kRows - 1) / kRows;  // rows are neighbouring tokens
  parallel_for(heads * blocks, [&](size_t task) {
    const size_t head = task / blocks, begin = task % blocks * kRows;
    const size_t at = begin * width + head * head_size;
    attend_rows({.q = q + at,
                 .out = out + at,
                 .stride = width,
                 .count = std::min(kRows, tokens - begin),
                 .first_limit = first + begin + 1,
                 .limit_step = 1},
                cache, head / shared, level);
  });
}

}  // namespace bitwright
