#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace bitwright {

// No fused multiply-add and a fixed order of sums: the bits do not depend on how a compiler vectorises.
// The first four are the definitions of what KernelLevel has under the same names.

enum class Activation : uint8_t {
  silu,       ///< x / (1 + e^-x)
  gelu,       ///< x / 2 (1 + erf(x / sqrt 2))
  gelu_tanh,  ///< x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
};

/// x[i] = activation(x[i]) * factor[i]; a null `factor` stands for ones.
void activate(Activation activation, float* x, const float* factor, size_t count);

/// x[i] = the derivative of the activation at x[i].
void activation_slope(Activation activation, float* x, size_t count);

/// x[i] = cap * tanh(scale * x[i] / cap).
void soft_cap(float* x, size_t count, float scale, float cap);

/// scores[i] = e^(scale * scores[i] - the largest of them); returns 1 / their sum. count > 0.
float softmax_terms(float* scores, size_t count, float scale);

/// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i].
void rms_norm(std::span<const float> x, std::span<const float> weight, float epsilon, float* out);

/// out[i] = (x[i] - mean(x)) / sqrt(variance(x) + epsilon) * weight[i] + bias[i].
void layer_norm(std::span<const float> x, std::span<const float> weight, std::span<const float> bias, float epsilon,
                float* out);

/// Rotates the pairs (x[i], x[i + n]), n = cosine.size(), as Hugging Face's rotate_half does; what
/// stands behind them is left alone.
void rotate_halves(float* x, std::span<const float> cosine, const float* sine);

/// x[i] += y[i].
void add(std::span<float> x, const float* y);

/// x[i] *= y[i].
void multiply(std::span<float> x, const float* y);

/// x[i] *= factor.
void scale(std::span<float> x, float factor);

}  // namespace bitwright
