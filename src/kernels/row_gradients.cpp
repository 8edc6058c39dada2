#include "kernels/row_gradients.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/vectorized.hpp"
#include "kernels/fixed_lanes.hpp"

namespace bitwright {
namespace {

/// The sum of term(i), i < count, in fixed_lanes.hpp's order. Always inline: its caller is what is compiled for several
/// instruction sets.
template <class Term>
[[gnu::always_inline]] inline float sum_terms(size_t count, Term term) {
  float lanes[kPanel] = {};
  size_t i = 0;
  for (; i + kPanel <= count; i += kPanel)
    for (size_t lane = 0; lane < kPanel; ++lane) lanes[lane] += term(i + lane);
  for (size_t lane = 0; i + lane < count; ++lane) lanes[lane] += term(i + lane);
  return merge_lanes(lanes, sum_of);
}

[[gnu::always_inline]] inline uint16_t bf16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

}  // namespace

BITWRIGHT_VECTORIZED void round_to_bf16(const float* __restrict x, size_t count, uint16_t* __restrict out,
                                        float factor) {
  for (size_t i = 0; i < count; ++i) out[i] = bf16_bits(x[i] * factor);
}

BITWRIGHT_VECTORIZED void rms_norm_gradient(std::span<const float> x, std::span<const float> weight, float epsilon,
                                            const float* __restrict dy, float* __restrict dx,
                                            float* __restrict dweight) {
  const size_t n = x.size();
  const float* const in = x.data();
  const float* const w = weight.data();
  const auto count = static_cast<float>(n);
  const float squares = sum_terms(n, [&](size_t i) { return in[i] * in[i]; });
  const float scale = 1 / std::sqrt(squares / count + epsilon);
  // y = s x w with s = (mean(x^2) + e)^-1/2, so dx = s w dy - x s^3 / n sum(x w dy).
  const float along = sum_terms(n, [&](size_t i) { return in[i] * w[i] * dy[i]; });
  const float back = scale * scale * scale * along / count;
  for (size_t i = 0; i < n; ++i) {
    dweight[i] += dy[i] * in[i] * scale;
    dx[i] = w[i] * dy[i] * scale - in[i] * back;
  }
}

BITWRIGHT_VECTORIZED void layer_norm_gradient(std::span<const float> x, std::span<const float> weight, float epsilon,
                                              const float* __restrict dy, float* __restrict dx,
                                              float* __restrict dweight, float* __restrict dbias) {
  const size_t n = x.size();
  const float* const in = x.data();
  const float* const w = weight.data();
  const auto count = static_cast<float>(n);
  const float mean = sum_terms(n, [&](size_t i) { return in[i]; }) / count;
  const float squares = sum_terms(n, [&](size_t i) { return (in[i] - mean) * (in[i] - mean); });
  const float scale = 1 / std::sqrt(squares / count + epsilon);
  // With z = (x - mean) s and g = w dy: dx = s (g - mean(g) - z mean(g z)).
  const float level = sum_terms(n, [&](size_t i) { return w[i] * dy[i]; }) / count;
  const float along = sum_terms(n, [&](size_t i) { return w[i] * dy[i] * ((in[i] - mean) * scale); }) / count;
  for (size_t i = 0; i < n; ++i) {
    const float z = (in[i] - mean) * scale;
    dweight[i] += dy[i] * z;
    dbias[i] += dy[i];
    dx[i] = (w[i] * dy[i] - level - z * along) * scale;
  }
}

BITWRIGHT_VECTORIZED float largest_of(const float* x, size_t count) {
  float lanes[kPanel];
  std::fill_n(lanes, kPanel, x[0]);
  size_t i = 0;
  for (; i + kPanel <= count; i += kPanel)
    for (size_t lane = 0; lane < kPanel; ++lane) lanes[lane] = larger_of(lanes[lane], x[i + lane]);
  for (size_t lane = 0; i + lane < count; ++lane) lanes[lane] = larger_of(lanes[lane], x[i + lane]);
  return merge_lanes(lanes, larger_of);
}

BITWRIGHT_VECTORIZED void softmax_gradient(const float* __restrict p, size_t count, float scale, float* __restrict d) {
  const float sum = sum_terms(count, [&](size_t i) { return p[i] * d[i]; });
  for (size_t i = 0; i < count; ++i) d[i] = p[i] * (d[i] - sum) * scale;
}

BITWRIGHT_VECTORIZED void soft_cap_gradient(const float* __restrict capped, size_t count, float cap,
                                            float* __restrict d) {
  const float reciprocal = 1 / cap;
  for (size_t i = 0; i < count; ++i) {
    const float t = capped[i] * reciprocal;
    d[i] *= 1 - t * t;
  }
}

BITWRIGHT_VECTORIZED void transpose(const float* __restrict x, size_t stride, size_t rows, size_t columns,
                                    float* __restrict out) {
  for (size_t begin = 0; begin < rows; begin += kPanel) {  // whole cache lines of `out`
    const size_t count = std::min(kPanel, rows - begin);
    for (size_t j = 0; j < columns; ++j)
      for (size_t i = 0; i < count; ++i) out[j * rows + begin + i] = x[(begin + i) * stride + j];
  }
}

BITWRIGHT_VECTORIZED void row_panels(const float* __restrict x, size_t stride, size_t rows, size_t columns,
                                     float* __restrict out) {
  for (size_t begin = 0; begin < rows; begin += kPanel, out += columns * kPanel) {
    const size_t count = std::min(kPanel, rows - begin);
    for (size_t j = 0; j < columns; ++j)
      for (size_t i = 0; i < kPanel; ++i) out[j * kPanel + i] = i < count ? x[(begin + i) * stride + j] : 0;
  }
}

void column_panels(const float* x, size_t stride, size_t rows, size_t columns, float* out) {
  for (size_t begin = 0; begin < columns; begin += kPanel) {
    const size_t count = std::min(kPanel, columns - begin);
    for (size_t i = 0; i < rows; ++i, out += kPanel) {
      std::copy_n(x + i * stride + begin, count, out);
      std::fill(out + count, out + kPanel, 0.0f);
    }
  }
}

}  // namespace bitwright
