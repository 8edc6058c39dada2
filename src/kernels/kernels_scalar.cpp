#include <cmath>
#include <cstring>

#include "base/error.hpp"
#include "kernels/decode.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/encode.hpp"
#include "kernels/fake_quantize.hpp"
#include "kernels/packed_matrix.hpp"
#include "kernels/rows.hpp"

namespace bitwright {
namespace {

template <typename T>
T load(const std::byte* data, size_t i) {
  T value;
  std::memcpy(&value, data + i * sizeof value, sizeof value);
  return value;
}

float element(const PackedMatrix& w, const std::byte* panel, size_t k, size_t lane) {
  const size_t i = k * kPanel + lane;
  switch (w.kind) {
    case CodeKind::f32:
      return load<float>(panel, i);
    case CodeKind::f16:
      return f16_to_f32(load<uint16_t>(panel, i));
    case CodeKind::bf16:
      return bf16_to_f32(load<uint16_t>(panel, i));
    case CodeKind::nibble:
      return w.table[load<uint32_t>(panel, k / 8 * kPanel + lane) >> (4 * (k % 8)) & 15];
    case CodeKind::int8:
      return static_cast<float>(load<int8_t>(panel, i));
    case CodeKind::uint8:
      return static_cast<float>(load<uint8_t>(panel, i));
    case CodeKind::table:
      return w.table[load<uint8_t>(panel, i)];
    case CodeKind::reference:
      break;
  }
  BW_ASSERT(false);
}

float group_value(const GroupValues& g, size_t i) {
  if (g.values.empty()) return g.constant;
  const std::byte* const data = g.values[0].bytes;
  if (g.dtype == DType::f32) return load<float>(data, i);
  const auto bits = load<uint16_t>(data, i);
  return g.dtype == DType::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

float weight(const PackedMatrix& w, size_t panel, size_t k, size_t lane) {
  const float e = element(w, w.panel(panel), k, lane);
  if (w.kind == CodeKind::f32 || w.kind == CodeKind::f16 || w.kind == CodeKind::bf16) return e;
  const size_t i = (panel * w.groups + k / w.group_size) * kPanel + lane;
  const float s = group_value(w.scale, i);
  switch (w.affine) {
    case Affine::scale:
      return e * s;
    case Affine::subtract_scale:
      return (e - group_value(w.offset, i)) * s;
    case Affine::scale_add:
      return e * s + group_value(w.offset, i);
  }
  BW_ASSERT(false);
}

void multiply_tile(const Tile& t) {
  for (size_t r = 0; r < t.rows; ++r)
    for (size_t c = 0; c < t.columns; ++c) {
      float& y = t.y[r * t.y_stride + c];
      float sum = t.add ? y : 0;
      for (size_t k = 0; k < t.depth; ++k)
        sum = std::fma(t.x[r * t.x_stride + k], t.w[c / kPanel * t.w_stride + k * kPanel + c % kPanel], sum);
      y = sum;
    }
}

void expand(const PackedMatrix& w, size_t panel, size_t k_begin, size_t k_end, float* out) {
  for (size_t k = k_begin; k < k_end; ++k)
    for (size_t lane = 0; lane < kPanel; ++lane) *out++ = weight(w, panel, k, lane);
}

void multiply_vector(const PackedMatrix& w, size_t panel_begin, size_t panel_end, const float* x, float* y) {
  for (size_t n = panel_begin * kPanel; n < std::min(w.rows, panel_end * kPanel); ++n) {
    y[n] = 0;
    for (size_t k = 0; k < w.columns; ++k) y[n] = std::fma(x[k], weight(w, n / kPanel, k, n % kPanel), y[n]);
  }
}

}  // namespace

const KernelLevel scalar_kernel_level = {
    .name = "scalar",
    .usable = [] { return true; },
    .multiply_tile = multiply_tile,
    .expand = expand,
    .multiply_vector = multiply_vector,
    .activate = activate,
    .activation_slope = activation_slope,
    .soft_cap = soft_cap,
    .softmax_terms = softmax_terms,
    .find_extremes = find_extremes,
    .search_ranges = search_ranges,
    .group_parameters = group_parameters,
    .encode_integers = encode_integers,
    .encode_table = encode_table,
    .decode_groups = decode_groups,
    .add_squares = add_squares,
    .fake_quantize_groups = fake_quantize_groups,
    .fake_quantize_gradients = fake_quantize_gradients,
};

}  // namespace bitwright
