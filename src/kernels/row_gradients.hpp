#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace bitwright {

// What elementwise.hpp has, backwards: rows of numbers, one thread. Sums run in the order of fixed_lanes.hpp and
// nothing is fused, so the bits are the same on every instruction set.

/// out[i] = x[i] * factor rounded to bfloat16 as f32_to_bf16() does.
void round_to_bf16(const float* x, size_t count, uint16_t* out, float factor = 1);

/// With y = rms_norm(x, weight): dx = the gradient of x, and the gradient of weight is added to dweight.
void rms_norm_gradient(std::span<const float> x, std::span<const float> weight, float epsilon, const float* dy,
                       float* dx, float* dweight);

/// With y = layer_norm(x, weight, bias): the same, and that of bias is added to dbias.
void layer_norm_gradient(std::span<const float> x, std::span<const float> weight, float epsilon, const float* dy,
                         float* dx, float* dweight, float* dbias);

/// The largest of `count` > 0 numbers.
float largest_of(const float* x, size_t count);

/// p: softmax probabilities, d: the gradient of what was summed with them. d[i] becomes the gradient of the scores:
/// scale * p[i] (d[i] - sum of p d).
void softmax_gradient(const float* p, size_t count, float scale, float* d);

/// d[i] *= the slope of soft_cap where it gave capped[i], but for the scale.
void soft_cap_gradient(const float* capped, size_t count, float cap, float* d);

/// out[i, j] = x[j, i]; x: [rows, columns] at `stride`, out: [columns, rows] without gaps.
void transpose(const float* x, size_t stride, size_t rows, size_t columns, float* out);

/// Panels as LayerCache has them, from rows at `stride`: out: [ceil(rows / kPanel)][columns][kPanel rows], zeros behind
/// the last row.
void row_panels(const float* x, size_t stride, size_t rows, size_t columns, float* out);
/// out: [ceil(columns / kPanel)][rows][kPanel columns], zeros behind the last column.
void column_panels(const float* x, size_t stride, size_t rows, size_t columns, float* out);

}  // namespace bitwright
