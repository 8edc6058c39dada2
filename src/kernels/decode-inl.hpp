// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_DECODE_INL
#define BITWRIGHT_KERNELS_DECODE_INL

#include "kernels/decode.hpp"
#include "kernels/encode-inl.hpp"
#include "kernels/weights-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

/// value(words) gives what kLanes codes stand for.
template <class Value>
HWY_INLINE void decode_groups_of(const GroupDecoding& d, const uint8_t* codes, size_t size, size_t groups,
                                 const float* scales, const float* zeros, float* out, Value value) {
  const hn::Rebind<uint8_t, F32> bytes;
  const V factor = hn::Set(kF32, d.factor);
  for (size_t g = 0; g < groups; ++g, codes += size, out += size) {
    const V scale = hn::Set(kF32, scales[g]), zero = hn::Set(kF32, zeros == nullptr ? 0 : zeros[g]);
    const auto decode = [&](const uint8_t* from) HWY_ATTR {
      const V e = value(hn::PromoteTo(kU32, hn::LoadU(bytes, from)));
      return hn::Mul(hn::Mul(d.subtracts ? hn::Sub(e, zero) : e, scale), factor);
    };
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) hn::StoreU(decode(codes + i), kF32, out + i);
    if (i == size) continue;
    uint8_t few[kLanes] = {};
    for (size_t lane = 0; i + lane < size; ++lane) few[lane] = codes[i + lane];
    hn::BlendedStore(decode(few), hn::FirstN(kF32, size - i), kF32, out + i);
  }
}

void decode_groups(const GroupDecoding& d, const std::byte* codes, size_t size, size_t groups, const float* scales,
                   const float* zeros, float* out) {
  using Element = GroupDecoding::Element;
  const auto* const from = reinterpret_cast<const uint8_t*>(codes);
  const auto run = [&](auto value) HWY_ATTR { decode_groups_of(d, from, size, groups, scales, zeros, out, value); };
  const float* const values = d.values.data();
  const auto sign = hn::Set(kI32, 1 << (d.bits - 1));
  const V low = hn::LoadU(kF32, values), high = hn::LoadU(kF32, values + kPanel - kLanes);
  switch (d.element) {
    case Element::is_signed:
      return run([=](Words code)
                     HWY_ATTR { return hn::ConvertTo(kF32, hn::Sub(hn::Xor(hn::BitCast(kI32, code), sign), sign)); });
    case Element::is_unsigned:
      return run([=](Words code) HWY_ATTR { return hn::ConvertTo(kF32, hn::BitCast(kI32, code)); });
    case Element::table16:
      return run([=](Words code) HWY_ATTR { return Nibble::look_up(code, low, high); });
    case Element::table256:
      return run([=](Words code) HWY_ATTR { return hn::GatherIndex(kF32, values, hn::BitCast(kI32, code)); });
  }
}

constexpr hn::Repartition<double, F32> kF64;

template <class T>
HWY_INLINE void add_squares_of(const T* original, const float* decoded, size_t count, double* difference,
                               double* norm) {
  constexpr size_t kSums = 2 * kParts, kWidth = kLanes / 2;
  using D = hn::Vec<decltype(kF64)>;
  D differences[kSums], norms[kSums];
  for (size_t s = 0; s < kSums; ++s) {
    differences[s] = hn::LoadU(kF64, difference + s * kWidth);
    norms[s] = hn::LoadU(kF64, norm + s * kWidth);
  }
  const hn::Half<F32> half;
  for (size_t i = 0; i < count; i += kPanel)
    for (size_t part = 0; part < kParts; ++part) {
      const V w = read_values(original + i + part * kLanes), v = hn::LoadU(kF32, decoded + i + part * kLanes);
      const D w_low = hn::PromoteTo(kF64, hn::LowerHalf(half, w)), w_high = hn::PromoteTo(kF64, hn::UpperHalf(half, w));
      const D d_low = hn::Sub(w_low, hn::PromoteTo(kF64, hn::LowerHalf(half, v)));
      const D d_high = hn::Sub(w_high, hn::PromoteTo(kF64, hn::UpperHalf(half, v)));
      differences[2 * part] = hn::MulAdd(d_low, d_low, differences[2 * part]);
      differences[2 * part + 1] = hn::MulAdd(d_high, d_high, differences[2 * part + 1]);
      norms[2 * part] = hn::MulAdd(w_low, w_low, norms[2 * part]);
      norms[2 * part + 1] = hn::MulAdd(w_high, w_high, norms[2 * part + 1]);
    }
  for (size_t s = 0; s < kSums; ++s) {
    hn::StoreU(differences[s], kF64, difference + s * kWidth);
    hn::StoreU(norms[s], kF64, norm + s * kWidth);
  }
}

void add_squares(DType dtype, const std::byte* original, const float* decoded, size_t count,
                 double (&difference)[kPanel], double (&norm)[kPanel]) {
  const size_t whole = count / kPanel * kPanel;
  with_stored(dtype, original,
              [&](const auto* from) HWY_ATTR { add_squares_of(from, decoded, whole, difference, norm); });
  bitwright::add_squares(dtype, original + whole * size_bytes(dtype), decoded + whole, count - whole, difference, norm);
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
