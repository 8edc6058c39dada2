#include "kernels/attention.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace bitwright {
namespace {

struct Case {
  size_t heads, kv_heads, head_size, tokens, window = 0;
  float cap = 0;
};
constexpr Case kCases[] = {{1, 1, 2, 1},       {4, 2, 8, 1},          {4, 4, 16, 15},         {6, 2, 20, 17},
                           {7, 1, 32, 23},     {16, 2, 64, 40},       {3, 3, 128, 70},        {2, 1, 34, 33},
                           {2, 2, 8, 40, 1},   {2, 1, 8, 40, 3},      {4, 2, 10, 61, 17},     {2, 1, 16, 70, 16},
                           {3, 1, 6, 30, 200}, {2, 2, 8, 20, 0, 2.f}, {4, 1, 12, 50, 9, 0.5f}};

AttentionRule rule(const Case& c) {
  return {.scale = 0.9f / std::sqrt(static_cast<float>(c.head_size)), .cap = c.cap, .window = c.window};
}

struct Inputs {
  std::vector<float> q, k, v;
};

Inputs draw(const Case& c) {
  std::mt19937 random(1);
  const auto fill = [&](size_t count) {
    std::vector<float> values(count);
    for (float& x : values) x = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 400;
    return values;
  };
  return {fill(c.tokens * c.heads * c.head_size), fill(c.tokens * c.kv_heads * c.head_size),
          fill(c.tokens * c.kv_heads * c.head_size)};
}

/// All tokens, in calls of `step` of them, each stored just before.
std::vector<float> attend_in_steps(const Case& c, const Inputs& in, size_t step, const KernelLevel& level) {
  LayerCache cache(c.kv_heads, c.head_size, c.tokens);
  std::vector<float> out(in.q.size());
  const size_t width = c.heads * c.head_size, kv_width = c.kv_heads * c.head_size;
  for (size_t first = 0; first < c.tokens; first += step) {
    const size_t count = std::min(step, c.tokens - first);
    for (size_t i = first; i < first + count; ++i) cache.store(i, &in.k[i * kv_width], &in.v[i * kv_width]);
    attend(&in.q[first * width], count, first, c.heads, cache, rule(c), &out[first * width], level);
  }
  return out;
}

std::vector<double> attend_plainly(const Case& c, const Inputs& in) {
  std::vector<double> out(in.q.size());
  const size_t shared = c.heads / c.kv_heads;
  for (size_t t = 0; t < c.tokens; ++t)
    for (size_t h = 0; h < c.heads; ++h) {
      const float* const q = &in.q[(t * c.heads + h) * c.head_size];
      std::vector<double> weights;
      double sum = 0;
      const size_t begin = c.window != 0 && t >= c.window ? t + 1 - c.window : 0;
      for (size_t i = begin; i <= t; ++i) {
        double score = 0;
        for (size_t d = 0; d < c.head_size; ++d)
          score += double{q[d]} * double{in.k[(i * c.kv_heads + h / shared) * c.head_size + d]};
        score *= double{rule(c).scale};
        if (c.cap > 0) score = double{c.cap} * std::tanh(score / double{c.cap});
        weights.push_back(std::exp(score));
        sum += weights.back();
      }
      for (size_t i = begin; i <= t; ++i)
        for (size_t d = 0; d < c.head_size; ++d)
          out[(t * c.heads + h) * c.head_size + d] +=
              weights[i - begin] / sum * double{in.v[(i * c.kv_heads + h / shared) * c.head_size + d]};
    }
  return out;
}

TEST(KernelsAttention, IsAttention) {
  for (const Case& c : kCases) {
    const Inputs in = draw(c);
    const std::vector<float> out = attend_in_steps(c, in, c.tokens, active_kernel_level());
    const std::vector<double> expected = attend_plainly(c, in);
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(double{out[i]}, expected[i], 1e-5) << c.head_size << ", " << i;
  }
}

TEST(KernelsAttention, SameBitsInEveryStepAndLevel) {
  for (const Case& c : kCases) {
    const Inputs in = draw(c);
    const std::vector<float> expected = attend_in_steps(c, in, 1, find_kernel_level("scalar"));
    for (const KernelLevel& level : kernel_levels()) {
      if (!level.usable()) continue;
      for (const size_t step : {size_t{1}, size_t{5}, size_t{16}, c.tokens})
        ASSERT_EQ(attend_in_steps(c, in, step, level), expected) << level.name << ", " << step;
    }
  }
}

}  // namespace
}  // namespace bitwright
