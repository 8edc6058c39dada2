#include "kernels/elementwise.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/exponential.hpp"
#include "kernels/fixed_lanes.hpp"
#include "kernels/tanh_erf.hpp"

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

template <class Function>
void apply(float* x, const float* factor, size_t count, Function function) {
  for (size_t i = 0; i < count; ++i) x[i] = factor != nullptr ? function(x[i]) * factor[i] : function(x[i]);
}

}  // namespace

void activate(Activation activation, float* x, const float* factor, size_t count) {
  switch (activation) {
    case Activation::silu:
      return apply(x, factor, count, [](float v) { return v / (1 + exponential(-v)); });
    case Activation::gelu:
      return apply(x, factor, count, [](float v) { return v * 0.5f * (1 + error_function(v * Gelu::kSqrtHalf)); });
    case Activation::gelu_tanh:
      return apply(x, factor, count, [](float v) {
        const float inner = v * Gelu::kSqrt2OverPi * (1 + v * v * Gelu::kCubic);
        return v * 0.5f * (1 + hyperbolic_tangent(inner));
      });
  }
}

void activation_slope(Activation activation, float* x, size_t count) {
  switch (activation) {
    case Activation::silu:  // s (1 + x (1 - s)), s = 1 / (1 + e^-x)
      return apply(x, nullptr, count, [](float v) {
        const float s = 1 / (1 + exponential(-v));
        return s * (1 + v * (1 - s));
      });
    case Activation::gelu:  // the normal distribution's function, and x times its density
      return apply(x, nullptr, count, [](float v) {
        const float below = 0.5f * (1 + error_function(v * Gelu::kSqrtHalf));
        const float bounded = std::abs(v) < Gelu::kFar ? v : std::copysign(Gelu::kFar, v);
        return below + bounded * exponential(bounded * bounded * -0.5f) * Gelu::kSqrtHalfOverPi;
      });
    case Activation::gelu_tanh:
      return apply(x, nullptr, count, [](float v) {
        const float bounded = std::abs(v) < Gelu::kFar ? v : std::copysign(Gelu::kFar, v);
        const float square = bounded * bounded * Gelu::kCubic;
        const float t = hyperbolic_tangent(bounded * Gelu::kSqrt2OverPi * (1 + square));
        const float inner = Gelu::kSqrt2OverPi * (1 + square * 3);
        return 0.5f * (1 + t) + 0.5f * bounded * (1 - t * t) * inner;
      });
  }
}

void soft_cap(float* x, size_t count, float scale, float cap) {
  const float inner = scale / cap;
  for (size_t i = 0; i < count; ++i) x[i] = hyperbolic_tangent(x[i] * inner) * cap;
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

void layer_norm(std::span<const float> x, std::span<const float> weight, std::span<const float> bias, float epsilon,
                float* out) {
  const auto count = static_cast<float>(x.size());
  const float mean = reduce(x, 0, sum_of, sum_of) / count;
  const float squares = reduce(
      x, 0, [mean](float lane, float v) { return lane + (v - mean) * (v - mean); }, sum_of);
  const float scale = 1 / std::sqrt(squares / count + epsilon);
  for (size_t i = 0; i < x.size(); ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
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

void multiply(std::span<float> x, const float* y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] *= y[i];
}

void scale(std::span<float> x, float factor) {
  for (float& v : x) v *= factor;
}

}  // namespace bitwright
