#include "kernels/elementwise.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/exponential.hpp"
#include "kernels/fixed_lanes.hpp"

namespace bitwright {
namespace {

/// step(lane, x[i]) for every i on lane i % kPanel, then merge() of the lanes.
template <class Step, class Merge>
float reduce(std::span<const float> x, float initial, Step step, Merge merge) {
  float lanes[kPanel];
  std::ranges::fill(lanes, initial);
  size_t i = 0;
  for (; i + kPanel <= x.size(); i += kPanel)
    for (size_t lane = 0; lane < kPanel; ++lane) lanes[lane] = step(lanes[lane], x[i + lane]);
  for (size_t lane = 0; i + lane < x.size(); ++lane) lanes[lane] = step(lanes[lane], x[i + lane]);
  return merge_lanes(lanes, merge);
}

}  // namespace

void silu_multiply(float* gate, const float* up, size_t count) {
  for (size_t i = 0; i < count; ++i) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

float softmax_terms(float* scores, size_t count, float scale) {
  const std::span all(scores, count);
  for (float& s : all) s *= scale;
  const float largest = reduce(all, scores[0], larger_of, larger_of);
  for (float& s : all) s = exponential(s - largest);
  return 1 / reduce(all, 0, sum_of, sum_of);
}

void rms_norm(std::span<const float> x, std::span<const float> weight, float epsilon, float* out) {
  const float squares = reduce(
      x, 0, [](float lane, float v) { return lane + v * v; }, sum_of);
  const float scale = 1 / std::sqrt(squares / static_cast<float>(x.size()) + epsilon);
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weight[i];
}

void rotate_halves(float* x, std::span<const float> cosine, const float* sine) {
  const size_t half = cosine.size();
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

void add(std::span<float> x, const float* y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

}  // namespace bitwright
