// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_WEIGHTS_INL
#define BITWRIGHT_KERNELS_WEIGHTS_INL

#include "kernels/lanes-inl.hpp"
#include "kernels/packed_matrix.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

// Each Element reads kLanes neighbours of one column k, from lane `lane` of a panel on, as f32.

/// Elements stored one number each.
template <class Number>
struct Plain {
  const std::byte* data;
  Plain(const PackedMatrix& w, size_t panel, size_t lane) : data(w.panel(panel) + lane * sizeof(Number)) {}

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
  const float* table;
  Nibble(const PackedMatrix& w, size_t panel, size_t lane)
      : data(reinterpret_cast<const uint32_t*>(w.panel(panel)) + lane), table(w.table.data()) {}

  /// The values that each word's lowest four bits select from `low` and `high`, which are the same for 16 lanes.
  static HWY_INLINE V look_up(Words word, V low, V high) {
#if HWY_TARGET == HWY_AVX3
    static_cast<void>(high);
    return V{_mm512_permutexvar_ps(word.raw, low.raw)};  // looks at no other bits, so there is nothing to mask
#else
    const auto index = hn::IndicesFromVec(kF32, hn::And(word, hn::Set(kU32, 7)));
    const auto upper = hn::BitCast(kF32, hn::ShiftLeft<28>(word));  // bit 3 becomes the sign
    return hn::IfNegativeThenElse(upper, hn::TableLookupLanes(high, index), hn::TableLookupLanes(low, index));
#endif
  }

  template <class Use>
  HWY_INLINE void each(size_t begin, size_t end, Use use) const {
    const V low = hn::LoadU(kF32, table), high = hn::LoadU(kF32, table + kPanel - kLanes);
    for (size_t k = begin; k < end;) {
      auto word = hn::ShiftRightSame(hn::LoadU(kU32, data + k / 8 * kPanel), static_cast<int>(4 * (k % 8)));
      if (k % 8 == 0 && end - k >= 8) {
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; ++i, word = hn::ShiftRight<4>(word)) use(k + i, look_up(word, low, high));
        k += 8;
      } else {
        for (const size_t stop = HWY_MIN(end, (k / 8 + 1) * 8); k < stop; ++k, word = hn::ShiftRight<4>(word))
          use(k, look_up(word, low, high));
      }
    }
  }
};

HWY_INLINE V load_group_value(const GroupValues& g, size_t i) {
  if (g.values.empty()) return hn::Set(kF32, g.constant);
  const std::byte* const data = g.values.data()->bytes;
  if (g.dtype == DType::f32) return hn::LoadU(kF32, reinterpret_cast<const float*>(data) + i);
  if (g.dtype == DType::f16) return Plain<hwy::float16_t>::read(reinterpret_cast<const hwy::float16_t*>(data) + i);
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

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
