#include "kernels/row_gradients.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/dtype.hpp"
#include "kernels/attention_gradient.hpp"
#include "kernels/elementwise.hpp"

namespace bitwright {
namespace {

std::vector<float> some(size_t count, float phase) {
  std::vector<float> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = std::sin(static_cast<float>(i) * 1.7f + phase) * 2;
  return x;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

/// The slope of dot(function(x), dy) along each number of x, by central differences.
template <class Function>
void expect_slopes(Function function, const std::vector<float>& x, const std::vector<float>& dy,
                   const std::vector<float>& dx, double tolerance) {
  constexpr float kStep = 1.0f / 64;
  for (size_t i = 0; i < x.size(); ++i) {
    std::vector<float> up = x, down = x;
    up[i] += kStep;
    down[i] -= kStep;
    EXPECT_NEAR(double{dx[i]}, (dot(function(up), dy) - dot(function(down), dy)) * 32, tolerance) << i;
  }
}

TEST(KernelsRowGradients, Bfloat16IsTheDefinitions) {
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 65521)
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  for (const uint32_t bits : {0x7f800001u, 0xffffffffu, 0x7f7fffffu, 0x3f808000u, 0x3f818000u})
    x.push_back(std::bit_cast<float>(bits));
  std::vector<uint16_t> out(x.size());
  round_to_bf16(x.data(), x.size(), out.data());
  for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(out[i], f32_to_bf16(x[i])) << i;
  round_to_bf16(x.data(), 20, out.data(), 0.25f);
  for (size_t i = 0; i < 20; ++i) EXPECT_EQ(out[i], f32_to_bf16(x[i] * 0.25f));
}

TEST(KernelsRowGradients, Norms) {
  for (const size_t n : {3, 16, 37}) {
    const std::vector<float> x = some(n, 0), weight = some(n, 1), bias = some(n, 2), dy = some(n, 3);
    std::vector<float> dx(n), dweight(n, 1.0f), dbias(n, 1.0f);
    const auto rms = [&](const std::vector<float>& in, const std::vector<float>& by) {
      std::vector<float> out(n);
      rms_norm(in, by, 1e-5f, out.data());
      return out;
    };
    rms_norm_gradient(x, weight, 1e-5f, dy.data(), dx.data(), dweight.data());
    for (float& d : dweight) d -= 1;  // it is added to
    expect_slopes([&](const std::vector<float>& in) { return rms(in, weight); }, x, dy, dx, 2e-3);
    expect_slopes([&](const std::vector<float>& by) { return rms(x, by); }, weight, dy, dweight, 2e-3);

    const auto layer = [&](const std::vector<float>& in, const std::vector<float>& by) {
      std::vector<float> out(n);
      layer_norm(in, by, bias, 1e-5f, out.data());
      return out;
    };
    dweight.assign(n, 0);
    layer_norm_gradient(x, weight, 1e-5f, dy.data(), dx.data(), dweight.data(), dbias.data());
    expect_slopes([&](const std::vector<float>& in) { return layer(in, weight); }, x, dy, dx, 2e-3);
    expect_slopes([&](const std::vector<float>& by) { return layer(x, by); }, weight, dy, dweight, 2e-3);
    for (size_t i = 0; i < n; ++i) EXPECT_EQ(dbias[i], 1 + dy[i]);
  }
}

TEST(KernelsRowGradients, SoftmaxAndSoftCap) {
  for (const size_t n : {1, 16, 21}) {
    const std::vector<float> x = some(n, 0), dy = some(n, 1);
    const auto softmax = [&](std::vector<float> in) {
      scale(in, softmax_terms(in.data(), n, 0.7f));
      return in;
    };
    std::vector<float> d = dy;
    softmax_gradient(softmax(x).data(), n, 0.7f, d.data());
    expect_slopes(softmax, x, dy, d, 1e-3);
    const auto capped = [&](std::vector<float> in) {
      soft_cap(in.data(), n, 1, 3);
      return in;
    };
    d = dy;
    soft_cap_gradient(capped(x).data(), n, 3, d.data());
    expect_slopes(capped, x, dy, d, 1e-3);
  }
}

TEST(KernelsRowGradients, LargestOf) {
  std::vector<float> x(40, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(largest_of(x.data(), 40), x[0]);
  for (const size_t at : {0, 15, 16, 33, 39}) {
    x[at] = static_cast<float>(at) - 100;
    EXPECT_EQ(largest_of(x.data(), at + 1), x[at]);
  }
}

TEST(KernelsRowGradients, Panels) {
  constexpr size_t kStride = 23;
  for (const auto& [rows, columns] : {std::pair<size_t, size_t>{1, 1}, {16, 5}, {19, 20}}) {
    const std::vector<float> x = some(rows * kStride, 0);
    const size_t row_count = (rows + kPanel - 1) / kPanel, column_count = (columns + kPanel - 1) / kPanel;
    std::vector<float> turned(rows * columns), by_row(row_count * kPanel * columns),
        by_column(column_count * kPanel * rows);
    transpose(x.data(), kStride, rows, columns, turned.data());
    row_panels(x.data(), kStride, rows, columns, by_row.data());
    column_panels(x.data(), kStride, rows, columns, by_column.data());
    for (size_t i = 0; i < row_count * kPanel; ++i)
      for (size_t j = 0; j < columns; ++j)
        EXPECT_EQ(by_row[(i / kPanel * columns + j) * kPanel + i % kPanel], i < rows ? x[i * kStride + j] : 0);
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < column_count * kPanel; ++j)
        EXPECT_EQ(by_column[(j / kPanel * rows + i) * kPanel + j % kPanel], j < columns ? x[i * kStride + j] : 0);
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < columns; ++j) EXPECT_EQ(turned[j * rows + i], x[i * kStride + j]);
  }
}

TEST(KernelsAttentionGradient, SameBitsOnEveryLevel) {
  constexpr size_t kTokens = 101, kHeads = 2, kSize = 19, kWidth = kHeads * kSize;
  const std::vector<float> q = some(kTokens * kWidth, 0), k = some(kTokens * kSize, 1), v = some(kTokens * kSize, 2);
  const Sequence sequence = {.q = q.data(),
                             .k = k.data(),
                             .v = v.data(),
                             .q_stride = kWidth,
                             .kv_stride = kSize,
                             .tokens = kTokens,
                             .heads = kHeads,
                             .head_size = kSize};
  for (const AttentionRule& rule :
       {AttentionRule{.scale = 0.2f}, AttentionRule{.scale = 0.2f, .cap = 3, .window = 40}}) {
    std::vector<std::vector<float>> first;
    for (const KernelLevel& level : kernel_levels()) {
      if (!level.usable()) continue;
      std::vector<float> out(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
      attend_sequence(sequence, rule, out.data(), level);
      attend_sequence_gradient(sequence, rule, q.data(), dq.data(), dk.data(), dv.data(), level);
      const std::vector<std::vector<float>> all = {out, dq, dk, dv};
      if (first.empty()) first = all;
      EXPECT_EQ(all, first) << level.name;
    }
  }
}

/// What the runtime computes with a cache.
TEST(KernelsAttentionGradient, ForwardIsAttend) {
  constexpr size_t kTokens = 70, kHeads = 3, kSize = 8;
  const std::vector<float> q = some(kTokens * kHeads * kSize, 0), k = some(kTokens * kSize, 1),
                           v = some(kTokens * kSize, 2);
  LayerCache cache(1, kSize, kTokens);
  for (size_t t = 0; t < kTokens; ++t) cache.store(t, k.data() + t * kSize, v.data() + t * kSize);
  for (const size_t window : {0, 1, 20}) {
    const AttentionRule rule = {.scale = 0.3f, .cap = 0, .window = window};
    std::vector<float> expected(q.size()), out(q.size());
    attend(q.data(), kTokens, 0, kHeads, cache, rule, expected.data());
    attend_sequence({.q = q.data(),
                     .k = k.data(),
                     .v = v.data(),
                     .q_stride = kHeads * kSize,
                     .kv_stride = kSize,
                     .tokens = kTokens,
                     .heads = kHeads,
                     .head_size = kSize},
                    rule, out.data());
    for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], expected[i], 1e-5f) << i;
  }
}

}  // namespace
}  // namespace bitwright
