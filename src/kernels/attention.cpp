#include "kernels/attention.hpp"

#include <algorithm>
#include <span>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/elementwise.hpp"

namespace bitwright {
namespace {

constexpr size_t kRows = 6;  // as the tiles have them

size_t panels(size_t n) { return (n + kPanel - 1) / kPanel; }

/// Up to kRows queries that read one key-value head; row r is at position first + r * step.
struct Rows {
  const float* q;
  float* out;
  size_t stride;  ///< of q and out
  size_t count, first, step;
  size_t window;
  size_t limit(size_t row) const { return first + row * step + 1; }
  size_t begin(size_t row) const { return window == 0 || limit(row) < window ? 0 : limit(row) - window; }
};

/// scores[r, i - base] of the positions i in [base, the last row's limit).
void score(const Rows& rows, const LayerCache& cache, size_t kv_head, size_t base, const AttentionRule& rule,
           std::span<float> scores, const KernelLevel& level) {
  const size_t width = scores.size() / rows.count;
  level.multiply_tile({.x = rows.q,
                       .x_stride = rows.stride,
                       .w = cache.keys(kv_head) + base / kPanel * cache.key_panel(),
                       .w_stride = cache.key_panel(),
                       .y = scores.data(),
                       .y_stride = width,
                       .rows = rows.count,
                       .depth = cache.head_size(),
                       .columns = width,
                       .add = false});
  if (rule.cap > 0) level.soft_cap(scores.data(), scores.size(), rule.scale, rule.cap);
}

/// Each row's sum runs over its own positions in order, whatever rows it is computed with: first those that it alone
/// needs, then those that all rows see, then again its own.
void add_values(const Rows& rows, const LayerCache& cache, size_t kv_head, size_t base, std::span<const float> scores,
                const KernelLevel& level) {
  const size_t width = scores.size() / rows.count, last = rows.count - 1;
  const size_t all_begin = rows.begin(last), all_end = std::max(rows.limit(0), all_begin);
  const auto add = [&](size_t row, size_t count, size_t begin, size_t end) {
    if (begin >= end) return;
    level.multiply_tile({.x = scores.data() + row * width + (begin - base),
                         .x_stride = width,
                         .w = cache.values(kv_head) + begin * kPanel,
                         .w_stride = cache.value_panel(),
                         .y = rows.out + row * rows.stride,
                         .y_stride = rows.stride,
                         .rows = count,
                         .depth = end - begin,
                         .columns = cache.head_size(),
                         .add = true});
  };
  for (size_t r = 0; r < rows.count; ++r) {
    std::fill_n(rows.out + r * rows.stride, cache.head_size(), 0.0f);
    add(r, 1, rows.begin(r), std::min(rows.limit(r), all_begin));
  }
  add(0, rows.count, all_begin, rows.limit(0));
  for (size_t r = 0; r < rows.count; ++r) add(r, 1, all_end, rows.limit(r));
}

void attend_rows(const Rows& rows, const LayerCache& cache, size_t kv_head, const AttentionRule& rule,
                 const KernelLevel& level) {
  const size_t base = rows.begin(0) / kPanel * kPanel, width = rows.limit(rows.count - 1) - base;
  std::vector<float> scores(rows.count * width);
  score(rows, cache, kv_head, base, rule, scores, level);
  float reciprocal[kRows];
  for (size_t r = 0; r < rows.count; ++r)
    reciprocal[r] = level.softmax_terms(scores.data() + r * width + (rows.begin(r) - base),
                                        rows.limit(r) - rows.begin(r), rule.cap > 0 ? 1 : rule.scale);
  add_values(rows, cache, kv_head, base, scores, level);
  for (size_t r = 0; r < rows.count; ++r) scale({rows.out + r * rows.stride, cache.head_size()}, reciprocal[r]);
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

void attend(const float* q, size_t tokens, size_t first, size_t heads, const LayerCache& cache,
            const AttentionRule& rule, float* out, const KernelLevel& level) {
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
                   .first = first,
                   .step = 0,
                   .window = rule.window},
                  cache, kv_head, rule, level);
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
                 .first = first + begin,
                 .step = 1,
                 .window = rule.window},
                cache, head / shared, rule, level);
  });
}

}  // namespace bitwright
