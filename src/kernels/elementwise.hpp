#pragma once

#include <cstddef>
#include <span>

namespace bitwright {

// No fused multiply-add and a fixed order of sums: the bits do not depend on how a compiler vectorises.
// The first two are the definitions of what KernelLevel has under the same names.

/// gate[i] = gate[i] / (1 + e^-gate[i]) * up[i].
void silu_multiply(float* gate, const float* up, size_t count);

/// scores[i] = e^(scale * scores[i] - the largest of them); returns 1 / their sum. count > 0.
float softmax_terms(float* scores, size_t count, float scale);

/// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i].
void rms_norm(std::span<const float> x, std::span<const float> weight, float epsilon, float* out);

/// Rotates the pairs (x[i], x[i + n]), n = cosine.size(), as Hugging Face's rotate_half does.
void rotate_halves(float* x, std::span<const float> cosine, const float* sine);

/// x[i] += y[i].
void add(std::span<float> x, const float* y);

}  // namespace bitwright
