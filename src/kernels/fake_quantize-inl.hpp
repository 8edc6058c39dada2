// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_FAKE_QUANTIZE_INL
#define BITWRIGHT_KERNELS_FAKE_QUANTIZE_INL

#include "kernels/encode-inl.hpp"
#include "kernels/fake_quantize.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

/// Up to kLanes values.
template <class T>
HWY_INLINE V read_part(const T* from, size_t count) {
  return count == kLanes ? read_values(from) : read_few(from, count);
}

HWY_INLINE void store_lanes(V v, float* to) { hn::StoreU(v, kF32, to); }
HWY_INLINE void store_lanes(V v, hwy::float16_t* to) {
  const hn::Rebind<hwy::float16_t, F32> half;
  hn::StoreU(hn::DemoteTo(half, v), half, to);
}
/// As f32_to_bf16 rounds what is not NaN.
HWY_INLINE void store_lanes(V v, hwy::bfloat16_t* to) {
  const auto bits = hn::BitCast(kU32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(kU32, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(kU32, 0x7fff)));
  const auto kept = hn::IfThenElse(hn::RebindMask(kU32, hn::Eq(v, v)), rounded, hn::Or(bits, hn::Set(kU32, 0x400000)));
  const hn::Rebind<uint16_t, F32> words;
  hn::StoreU(hn::DemoteTo(words, hn::BitCast(kI32, hn::ShiftRight<16>(kept))), words, reinterpret_cast<uint16_t*>(to));
}
template <class T>
HWY_INLINE void store_part(V v, T* to, size_t count) {
  if (count == kLanes) return store_lanes(v, to);
  T few[kLanes];
  store_lanes(v, few);
  for (size_t lane = 0; lane < count; ++lane) hwy::CopyBytes<sizeof(T)>(&few[lane], to + lane);
}

/// use(the first of up to kLanes elements, how many, which lanes of a panel they are).
template <class Use>
HWY_INLINE void for_each_part(size_t size, Use use) {
  size_t i = 0;
  for (; i + kPanel <= size; i += kPanel)
    for (size_t part = 0; part < kParts; ++part) use(i + part * kLanes, kLanes, part);
  for (size_t part = 0; i < size; i += kLanes, ++part) use(i, HWY_MIN(kLanes, size - i), part);
}

/// One group's grid.
struct FakeGrid {
  V scale, inverse, lowest, highest;
  HWY_INLINE FakeGrid(const FakeGroups& q, size_t g) {
    const float s = q.scales[g], zero = q.zeros == nullptr ? 0 : q.zeros[g];
    scale = hn::Set(kF32, s);
    inverse = hn::Set(kF32, s == 0 ? 0 : 1 / s);
    lowest = hn::Set(kF32, q.lowest - zero);
    highest = hn::Set(kF32, q.highest - zero);
  }
  HWY_INLINE V clamp(V rounded) const { return hn::Min(hn::Max(rounded, lowest), highest); }
};

template <class T, class U>
HWY_INLINE void fake_quantize_of(const FakeGroups& q, const T* values, U* out) {
  for (size_t g = 0; g < q.groups; ++g, values += q.size, out += q.size) {
    const FakeGrid grid(q, g);
    for_each_part(q.size, [&](size_t i, size_t count, size_t) HWY_ATTR {
      const V code = grid.clamp(hn::Round(hn::Mul(read_part(values + i, count), grid.inverse)));
      store_part(hn::Mul(code, grid.scale), out + i, count);
    });
  }
}

template <class T, class G>
HWY_INLINE void fake_gradients_of(const FakeGroups& q, const T* values, const G* gradient, T* out, float* scale_sums,
                                  float* clipped_sums) {
  for (size_t g = 0; g < q.groups; ++g, values += q.size, gradient += q.size, out += q.size) {
    const FakeGrid grid(q, g);
    V scale[kParts], clipped[kParts];
    for (size_t part = 0; part < kParts; ++part) scale[part] = clipped[part] = hn::Zero(kF32);
    for_each_part(q.size, [&](size_t i, size_t count, size_t part) HWY_ATTR {
      const V quotient = hn::Mul(read_part(values + i, count), grid.inverse), rounded = hn::Round(quotient);
      const V slope = hn::IfThenElseZero(hn::FirstN(kF32, count), read_part(gradient + i, count));
      const auto inside = hn::And(hn::Ge(rounded, grid.lowest), hn::Le(rounded, grid.highest));
      const V code = grid.clamp(rounded);
      scale[part] = hn::MulAdd(slope, hn::IfThenElse(inside, hn::Sub(code, quotient), code), scale[part]);
      clipped[part] = hn::Add(clipped[part], hn::IfThenZeroElse(inside, slope));
      store_part(hn::IfThenElseZero(inside, slope), out + i, count);
    });
    float lanes[kPanel];
    const auto merged = [&](const V(&sums)[kParts]) HWY_ATTR {
      for (size_t part = 0; part < kParts; ++part) hn::StoreU(sums[part], kF32, lanes + part * kLanes);
      return merge_lanes(lanes);
    };
    scale_sums[g] = merged(scale);
    clipped_sums[g] = merged(clipped);
  }
}

void fake_quantize_groups(const FakeGroups& q, DType type, std::byte* out) {
  with_stored(q.dtype, q.values, [&](const auto* values) HWY_ATTR {
    with_stored(type, out, [&](const auto* to) HWY_ATTR {
      fake_quantize_of(q, values, const_cast<std::remove_const_t<std::remove_pointer_t<decltype(to)>>*>(to));
    });
  });
}

void fake_quantize_gradients(const FakeGroups& q, DType type, const std::byte* gradient, std::byte* out,
                             float* scale_sums, float* clipped_sums) {
  with_stored(q.dtype, q.values, [&](const auto* values) HWY_ATTR {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    with_stored(type, gradient, [&](const auto* slopes) HWY_ATTR {
      fake_gradients_of(q, values, slopes, reinterpret_cast<T*>(out), scale_sums, clipped_sums);
    });
  });
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
