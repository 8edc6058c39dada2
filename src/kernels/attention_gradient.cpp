#include "kernels/attention_gradient.hpp"

#include <algorithm>
#include <span>
#include <vector>

#include "kernels/elementwise.hpp"
#include "kernels/row_gradients.hpp"

namespace bitwright {
namespace {

constexpr size_t kRows = 48;  // neighbouring queries of one head that are computed together

size_t padded(size_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

/// Tokens [first, first + count) as queries of one head. They see nothing before `base` or from `base + width` on.
struct Block {
  size_t first, count, base, width;
};

Block block_of(const Sequence& s, const AttentionRule& rule, size_t first) {
  const size_t count = std::min(kRows, s.tokens - first);
  const size_t base = rule.window == 0 || first + 1 <= rule.window ? 0 : (first + 1 - rule.window) / kPanel * kPanel;
  return {.first = first, .count = count, .base = base, .width = first + count - base};
}

/// y = x w, w in panels.
void multiply(const KernelLevel& level, const float* x, size_t x_stride, const float* w, size_t w_stride, float* y,
              size_t y_stride, size_t rows, size_t depth, size_t columns, bool add = false) {
  level.multiply_tile({.x = x,
                       .x_stride = x_stride,
                       .w = w,
                       .w_stride = w_stride,
                       .y = y,
                       .y_stride = y_stride,
                       .rows = rows,
                       .depth = depth,
                       .columns = columns,
                       .add = add});
}

/// p: [count, width], the softmax of the block's scores, 0 where a query does not see. capped: null, or for the scores
/// after the soft cap.
void probabilities(const Sequence& s, const AttentionRule& rule, const KernelLevel& level, const Block& b,
                   const float* q, const float* keys, float* p, float* capped) {
  multiply(level, q, s.q_stride, keys + b.base * s.head_size, s.head_size * kPanel, p, b.width, b.count, s.head_size,
           b.width);
  if (rule.cap > 0) level.soft_cap(p, b.count * b.width, rule.scale, rule.cap);
  if (capped != nullptr) std::copy_n(p, b.count * b.width, capped);
  for (size_t r = 0; r < b.count; ++r, p += b.width) {
    const size_t end = b.first + r + 1, begin = rule.window == 0 || end < rule.window ? 0 : end - rule.window;
    const std::span row(p + (begin - b.base), end - begin);
    std::fill(p, row.data(), 0.0f);
    std::fill(row.data() + row.size(), p + b.width, 0.0f);
    scale(row, level.softmax_terms(row.data(), row.size(), rule.cap > 0 ? 1 : rule.scale));
  }
}

}  // namespace

void attend_sequence(const Sequence& s, const AttentionRule& rule, float* out, const KernelLevel& level) {
  std::vector<float> keys(padded(s.tokens) * s.head_size), values(s.tokens * padded(s.head_size));
  row_panels(s.k, s.kv_stride, s.tokens, s.head_size, keys.data());
  column_panels(s.v, s.kv_stride, s.tokens, s.head_size, values.data());
  std::vector<float> p(kRows * s.tokens);
  for (size_t head = 0; head < s.heads; ++head)
    for (size_t first = 0; first < s.tokens; first += kRows) {
      const Block b = block_of(s, rule, first);
      const size_t at = first * s.q_stride + head * s.head_size;
      probabilities(s, rule, level, b, s.q + at, keys.data(), p.data(), nullptr);
      multiply(level, p.data(), b.width, values.data() + b.base * kPanel, s.tokens * kPanel, out + at, s.q_stride,
               b.count, b.width, s.head_size);
    }
}

void attend_sequence_gradient(const Sequence& s, const AttentionRule& rule, const float* dout, float* dq, float* dk,
                              float* dv, const KernelLevel& level) {
  const size_t size = s.head_size;
  std::vector<float> key_rows(padded(s.tokens) * size), key_columns(s.tokens * padded(size));
  std::vector<float> value_rows(padded(s.tokens) * size), block_columns(kRows * padded(size));
  row_panels(s.k, s.kv_stride, s.tokens, size, key_rows.data());
  column_panels(s.k, s.kv_stride, s.tokens, size, key_columns.data());
  row_panels(s.v, s.kv_stride, s.tokens, size, value_rows.data());
  for (size_t t = 0; t < s.tokens; ++t) {
    std::fill_n(dk + t * s.kv_stride, size, 0.0f);
    std::fill_n(dv + t * s.kv_stride, size, 0.0f);
  }
  std::vector<float> p(kRows * s.tokens), d(kRows * s.tokens), turned(kRows * s.tokens);
  std::vector<float> capped(rule.cap > 0 ? kRows * s.tokens : 0);
  for (size_t head = 0; head < s.heads; ++head)
    for (size_t first = 0; first < s.tokens; first += kRows) {
      const Block b = block_of(s, rule, first);
      const size_t at = first * s.q_stride + head * size;
      probabilities(s, rule, level, b, s.q + at, key_rows.data(), p.data(), capped.empty() ? nullptr : capped.data());
      multiply(level, dout + at, s.q_stride, value_rows.data() + b.base * size, size * kPanel, d.data(), b.width,
               b.count, size, b.width);
      const auto add_transposed = [&](const std::vector<float>& x, const float* rows, float* to) {  // to += xᵀ rows
        transpose(x.data(), b.width, b.count, b.width, turned.data());
        column_panels(rows, s.q_stride, b.count, size, block_columns.data());
        multiply(level, turned.data(), b.count, block_columns.data(), b.count * kPanel, to + b.base * s.kv_stride,
                 s.kv_stride, b.width, b.count, size, true);
      };
      add_transposed(p, dout + at, dv);
      for (size_t r = 0; r < b.count; ++r)
        softmax_gradient(p.data() + r * b.width, b.width, rule.scale, d.data() + r * b.width);
      if (rule.cap > 0) soft_cap_gradient(capped.data(), b.count * b.width, rule.cap, d.data());
      multiply(level, d.data(), b.width, key_columns.data() + b.base * kPanel, s.tokens * kPanel, dq + at, s.q_stride,
               b.count, b.width, size);
      add_transposed(d, s.q + at, dk);
    }
}

}  // namespace bitwright
