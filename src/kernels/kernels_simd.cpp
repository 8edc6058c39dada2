// Compiled once per instruction set by Highway's foreach_target.h; those without a fused multiply-add are left out.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/kernels_simd.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "kernels/packed_matrix.hpp"
#include "kernels/rows.hpp"

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr hn::CappedTag<float, kPanel> kF32;
using F32 = decltype(kF32);
constexpr hn::Rebind<int32_t, F32> kI32;
constexpr hn::Rebind<uint32_t, F32> kU32;
using V = hn::Vec<F32>;
using Words = hn::Vec<decltype(kU32)>;

constexpr size_t kLanes = hn::MaxLanes(kF32);
constexpr size_t kParts = kPanel / kLanes;  // vectors a panel

// ---- Tiles: R rows times P panels in registers

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

// ---- Weights: each Element reads kLanes neighbours of one column k, from lane `lane` of a panel on, as f32

/// Elements stored one number each.
template <class Number>
struct Plain {
  static constexpr size_t kStep = 1;
  const std::byte* data;
  Plain(const PackedMatrix& w, size_t panel, size_t lane)
      : data(w.panel(panel) + lane * sizeof(Number)) {}

  template <class Use>
  HWY_INLINE void each(size_t begin, size_t end, Use use) const {
    for (size_t k = begin; k < end; ++k) use(k, read(reinterpret_cast<const Number*>(data) + k * kPanel));
  }

  static HWY_INLINE V read(const float* from) { return hn::LoadU(kF32, from); }
  static HWY_INLINE V read(const hwy::float16_t* from) {
    return hn::PromoteTo(kF32, hn::LoadU(hn::Rebind<hwy::float16_t, F32>(), from));
  }
  static HWY_INLINE V read(const hwy::bfloat16_t* from) {
    return hn::PromoteTo(kF32, hn::LoadU(hn::Rebind<hwy::bfloat16_t, F32>(), from));
  }
  template <class Integer>
  static HWY_INLINE V read(const Integer* from) {
    return hn::ConvertTo(kF32, hn::PromoteTo(kI32, hn::LoadU(hn::Rebind<Integer, F32>(), from)));
  }
};

/// Codes of 8 bits that select from 256 values.
struct Table {
  const std::byte* data;
  const float* table;
  Table(const PackedMatrix& w, size_t panel, size_t lane) : data(w.panel(panel) + lane), table(w.table.data()) {}

  template <class Use>
  HWY_INLINE void each(size_t begin, size_t end, Use use) const {
    const auto* const codes = reinterpret_cast<const uint8_t*>(data);
    for (size_t k = begin; k < end; ++k) {
      const auto code = hn::PromoteTo(kI32, hn::LoadU(hn::Rebind<uint8_t, F32>(), codes + k * kPanel));
      use(k, hn::GatherIndex(kF32, table, code));
    }
  }
};

/// Codes of 4 bits, eight to a word, that select from 16 values held in registers.
struct Nibble {
  const uint32_t* data;
  V low, high;
  Nibble(const PackedMatrix& w, size_t panel, size_t lane)
      : data(reinterpret_cast<const uint32_t*>(w.panel(panel)) + lane),
        low(hn::LoadU(kF32, w.table.data())),
        high(hn::LoadU(kF32, w.table.data() + kPanel - kLanes)) {}

  /// Of each word's lowest four bits.
  HWY_INLINE V look_up(Words word) const {
    if constexpr (kLanes == 16) {
      return hn::TableLookupLanes(low, hn::IndicesFromVec(kF32, hn::And(word, hn::Set(kU32, 15))));
    } else {
      const auto index = hn::IndicesFromVec(kF32, hn::And(word, hn::Set(kU32, 7)));
      const auto upper = hn::BitCast(kF32, hn::ShiftLeft<28>(word));  // bit 3 becomes the sign
      return hn::IfNegativeThenElse(upper, hn::TableLookupLanes(high, index), hn::TableLookupLanes(low, index));
    }
  }

  template <class Use>
  HWY_INLINE void each(size_t begin, size_t end, Use use) const {
    for (size_t k = begin; k < end;) {
      auto word = hn::ShiftRightSame(hn::LoadU(kU32, data + k / 8 * kPanel), static_cast<int>(4 * (k % 8)));
      if (k % 8 == 0 && end - k >= 8) {
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; ++i, word = hn::ShiftRight<4>(word)) use(k + i, look_up(word));
        k += 8;
      } else {
        for (const size_t stop = HWY_MIN(end, (k / 8 + 1) * 8); k < stop; ++k, word = hn::ShiftRight<4>(word))
          use(k, look_up(word));
      }
    }
  }
};

HWY_INLINE V load_group_value(const GroupValues& g, size_t i) {
  if (g.values.empty()) return hn::Set(kF32, g.constant);
  const std::byte* const data = g.values.data()->bytes;
  if (g.dtype == DType::f32) return hn::LoadU(kF32, reinterpret_cast<const float*>(data) + i);
  if (g.dtype == DType::f16)
    return Plain<hwy::float16_t>::read(reinterpret_cast<const hwy::float16_t*>(data) + i);
  return Plain<hwy::bfloat16_t>::read(reinterpret_cast<const hwy::bfloat16_t*>(data) + i);
}

/// The parameters of one group, kLanes rows of it.
template <Affine affine>
struct Group {
  V s, z;
  Group(const PackedMatrix& w, size_t panel, size_t lane, size_t group) {
    const size_t i = (panel * w.groups + group) * kPanel + lane;
    s = load_group_value(w.scale, i);
    z = affine == Affine::scale ? hn::Zero(kF32) : load_group_value(w.offset, i);
  }
  HWY_INLINE V operator()(V e) const {
    if constexpr (affine == Affine::scale) return hn::Mul(e, s);
    if constexpr (affine == Affine::subtract_scale) return hn::Mul(hn::Sub(e, z), s);
    if constexpr (affine == Affine::scale_add) return hn::Add(hn::Mul(e, s), z);
    if constexpr (affine == Affine::scale_subtract) return hn::Sub(hn::Mul(e, s), z);
  }
};

/// Of plain floats: one group, nothing to do.
struct NoGroup {
  NoGroup(const PackedMatrix&, size_t, size_t, size_t) {}
  HWY_INLINE V operator()(V e) const { return e; }
};

/// Calls run<Element, Group>(), chosen once, outside the loops.
template <class Run>
void with_types(const PackedMatrix& w, Run run) {
  const auto quantized = [&]<class Element>() {
    switch (w.affine) {
      case Affine::scale:
        return run.template operator()<Element, Group<Affine::scale>>();
      case Affine::subtract_scale:
        return run.template operator()<Element, Group<Affine::subtract_scale>>();
      case Affine::scale_add:
        return run.template operator()<Element, Group<Affine::scale_add>>();
      case Affine::scale_subtract:
        return run.template operator()<Element, Group<Affine::scale_subtract>>();
    }
  };
  switch (w.kind) {
    case CodeKind::f32:
      return run.template operator()<Plain<float>, NoGroup>();
    case CodeKind::f16:
      return run.template operator()<Plain<hwy::float16_t>, NoGroup>();
    case CodeKind::bf16:
      return run.template operator()<Plain<hwy::bfloat16_t>, NoGroup>();
    case CodeKind::nibble:
      return quantized.template operator()<Nibble>();
    case CodeKind::int8:
      return quantized.template operator()<Plain<int8_t>>();
    case CodeKind::uint8:
      return quantized.template operator()<Plain<uint8_t>>();
    case CodeKind::table:
      return quantized.template operator()<Table>();
    case CodeKind::reference:
      return;
  }
}

template <class Element, class Affinity>
void expand_panel(const PackedMatrix& w, size_t panel, size_t k_begin, size_t k_end, float* out) {
  const size_t group_size = w.group_size != 0 ? w.group_size : w.columns;
  for (size_t part = 0; part < kParts; ++part) {
    const Element elements(w, panel, part * kLanes);
    float* const column = out + part * kLanes;
    for (size_t begin = k_begin, end; begin < k_end; begin = end) {
      const size_t group = begin / group_size;
      end = HWY_MIN(k_end, (group + 1) * group_size);
      const Affinity parameters(w, panel, part * kLanes, group);
      elements.each(begin, end, [&](size_t k, V e) HWY_ATTR {
        hn::StoreU(parameters(e), kF32, column + (k - k_begin) * kPanel);
      });
    }
  }
}

void expand(const PackedMatrix& w, size_t panel, size_t k_begin, size_t k_end, float* out) {
  with_types(w, [&]<class Element, class Affinity>() {
    expand_panel<Element, Affinity>(w, panel, k_begin, k_end, out);
  });
}

// ---- Vectors: sums are chains, so several panels go side by side, some columns of each in turn

constexpr size_t kChains = 4;
constexpr size_t kTurn = 32;

/// One chain a vector: `count` of them (at most kChains) from vector `first` on, counted through all panels.
template <class Element, class Affinity, size_t... C>
HWY_INLINE void multiply_chains(const PackedMatrix& w, size_t first, const float* x, float* y,
                                std::index_sequence<C...>) {
  const Element elements[] = {Element(w, (first + C) / kParts, (first + C) % kParts * kLanes)...};
  V sums[] = {(static_cast<void>(C), hn::Zero(kF32))...};
  const size_t group_size = w.group_size != 0 ? w.group_size : w.columns;
  for (size_t group = 0, begin = 0; begin < w.columns; ++group) {
    const size_t group_end = HWY_MIN(w.columns, begin + group_size);
    for (size_t end; begin < group_end; begin = end) {
      end = HWY_MIN(group_end, begin + kTurn);
      const auto turn = [&](size_t c) HWY_ATTR {
        const Affinity parameters(w, (first + c) / kParts, (first + c) % kParts * kLanes, group);
        V sum = sums[c];
        elements[c].each(begin, end, [&](size_t k, V e) HWY_ATTR {
          sum = hn::MulAdd(hn::Set(kF32, x[k]), parameters(e), sum);
        });
        sums[c] = sum;
      };
      (turn(C), ...);
    }
  }
  const auto store = [&](size_t c) HWY_ATTR {
    const size_t n = (first + c) * kLanes;
    if (n + kLanes <= w.rows)
      hn::StoreU(sums[c], kF32, y + n);
    else if (n < w.rows)
      hn::BlendedStore(sums[c], hn::FirstN(kF32, w.rows - n), kF32, y + n);
  };
  (store(C), ...);
}

template <class Element, class Affinity>
void multiply_panels(const PackedMatrix& w, size_t panel_begin, size_t panel_end, const float* x, float* y) {
  size_t v = panel_begin * kParts;
  for (; v + kChains <= panel_end * kParts; v += kChains)
    multiply_chains<Element, Affinity>(w, v, x, y, std::make_index_sequence<kChains>());
  for (; v < panel_end * kParts; ++v)
    multiply_chains<Element, Affinity>(w, v, x, y, std::make_index_sequence<1>());
}

void multiply_vector(const PackedMatrix& w, size_t panel_begin, size_t panel_end, const float* x, float* y) {
  with_types(w, [&]<class Element, class Affinity>() {
    multiply_panels<Element, Affinity>(w, panel_begin, panel_end, x, y);
  });
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#if HWY_ONCE
namespace bitwright {

std::span<const KernelLevel> simd_kernel_levels() {
#if (HWY_TARGETS & HWY_AVX3) && (HWY_TARGETS & HWY_AVX2)
  static constexpr KernelLevel levels[] = {
      {.name = "avx512",
       .usable = [] { return (hwy::SupportedTargets() & HWY_AVX3) != 0; },
       .multiply_tile = N_AVX3::multiply_tile,
       .expand = N_AVX3::expand,
       .multiply_vector = N_AVX3::multiply_vector},
      {.name = "avx2",
       .usable = [] { return (hwy::SupportedTargets() & HWY_AVX2) != 0; },
       .multiply_tile = N_AVX2::multiply_tile,
       .expand = N_AVX2::expand,
       .multiply_vector = N_AVX2::multiply_vector},
  };
  return levels;
#else
  return {};
#endif
}

}  // namespace bitwright
#endif
