// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_TILE_INL
#define BITWRIGHT_KERNELS_TILE_INL

#include "kernels/lanes-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

/// R rows times P panels, sums in registers.
template <size_t R, size_t P>
HWY_INLINE void multiply_block(const Tile& t, size_t row, size_t column) {
  V sum[R][P * kParts];
  const size_t columns = t.columns - column;
  const float* HWY_RESTRICT const x = t.x + row * t.x_stride;
  const float* HWY_RESTRICT const w = t.w + column / kPanel * t.w_stride;
  float* const y = t.y + row * t.y_stride + column;
  const auto for_each = [&](auto&& visit) HWY_ATTR {
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (size_t v = 0; v < P * kParts; ++v) visit(r, v);
  };
  const auto left = [&](size_t v) HWY_ATTR { return columns > v * kLanes ? columns - v * kLanes : 0; };

  for_each([&](size_t r, size_t v) HWY_ATTR {
    const float* const from = y + r * t.y_stride + v * kLanes;
    if (!t.add)
      sum[r][v] = hn::Zero(kF32);
    else if (left(v) >= kLanes)
      sum[r][v] = hn::LoadU(kF32, from);
    else
      sum[r][v] = left(v) == 0 ? hn::Zero(kF32) : hn::MaskedLoad(hn::FirstN(kF32, left(v)), kF32, from);
  });
  for (size_t k = 0; k < t.depth; ++k) {
    V weights[P * kParts];
#pragma GCC unroll 4
    for (size_t v = 0; v < P * kParts; ++v)
      weights[v] = hn::LoadU(kF32, w + v / kParts * t.w_stride + k * kPanel + v % kParts * kLanes);
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) {
      const V value = hn::Set(kF32, x[r * t.x_stride + k]);
#pragma GCC unroll 4
      for (size_t v = 0; v < P * kParts; ++v) sum[r][v] = hn::MulAdd(value, weights[v], sum[r][v]);
    }
  }
  for_each([&](size_t r, size_t v) HWY_ATTR {
    float* const to = y + r * t.y_stride + v * kLanes;
    if (left(v) >= kLanes)
      hn::StoreU(sum[r][v], kF32, to);
    else if (left(v) != 0)
      hn::BlendedStore(sum[r][v], hn::FirstN(kF32, left(v)), kF32, to);
  });
}

template <size_t P>
void multiply_columns(const Tile& t, size_t column) {
  constexpr size_t kRows = 6;  // 12 sums, enough to hide the latency; with weights and x they fill AVX2's 16 registers
  size_t row = 0;
  for (; row + kRows <= t.rows; row += kRows) multiply_block<kRows, P>(t, row, column);
  switch (t.rows - row) {
    case 5:
      return multiply_block<5, P>(t, row, column);
    case 4:
      return multiply_block<4, P>(t, row, column);
    case 3:
      return multiply_block<3, P>(t, row, column);
    case 2:
      return multiply_block<2, P>(t, row, column);
    case 1:
      return multiply_block<1, P>(t, row, column);
    default:
      return;
  }
}

void multiply_tile(const Tile& t) {
  constexpr size_t kWide = 2 / kParts;  // panels that give two vectors
  size_t column = 0;
  for (; column + (kWide - 1) * kPanel < t.columns; column += kWide * kPanel) multiply_columns<kWide>(t, column);
  if (column < t.columns) multiply_columns<1>(t, column);
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
