// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_DECODE_INL
#define BITWRIGHT_KERNELS_DECODE_INL

#include "kernels/decode.hpp"
#include "kernels/encode-inl.hpp"
#include "kernels/weights-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

/// Elements to values, one group or one element a lane.
template <GroupDecoding::Form form>
struct ToValues {
  V factor;
  HWY_INLINE V operator()(V e, V s, V z) const {
    using Form = GroupDecoding::Form;
    if constexpr (form == Form::subtract_scale) e = hn::Sub(e, z);
    const V scaled = hn::Mul(form == Form::divide ? hn::Div(e, s) : hn::Mul(e, s), factor);
    if constexpr (form == Form::scale_add) return hn::Add(scaled, z);
    if constexpr (form == Form::scale_subtract) return hn::Sub(scaled, z);
    return scaled;
  }
};

/// What kLanes codes stand for, before scale and offset.
template <GroupDecoding::Element element>
struct ElementValues {
  V low, high;
  const float* values;
  hn::Vec<decltype(kI32)> sign;
  explicit ElementValues(const GroupDecoding& d)
      : low(hn::LoadU(kF32, d.values.data())),
        high(hn::LoadU(kF32, d.values.data() + kPanel - kLanes)),
        values(d.values.data()),
        sign(hn::Set(kI32, 1 << (d.bits - 1))) {}

  HWY_INLINE V operator()(const uint8_t* codes) const {
    using Element = GroupDecoding::Element;
    const Words code = hn::PromoteTo(kU32, hn::LoadU(hn::Rebind<uint8_t, F32>(), codes));
    if constexpr (element == Element::table16) return Nibble::look_up(code, low, high);
    const auto number = hn::BitCast(kI32, code);
    if constexpr (element == Element::table256) return hn::GatherIndex(kF32, values, number);
    if constexpr (element == Element::is_unsigned) return hn::ConvertTo(kF32, number);
    return hn::ConvertTo(kF32, hn::Sub(hn::Xor(number, sign), sign));
  }
};

constexpr size_t kAhead = 1024;  ///< floats: a page, where the processor's own prefetching ends

/// out[i] = parameters(value of codes[i], i), kLanes at a time, at last fewer: then i is that of the first.
template <class Value, class Parameters>
HWY_INLINE void decode_run(const uint8_t* codes, size_t count, float* out, const Value& value,
                           const Parameters& parameters) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(out + i + kAhead, 1);
    hn::StoreU(parameters(value(codes + i), i), kF32, out + i);
  }
  if (i == count) return;
  uint8_t few[kLanes] = {};
  for (size_t lane = 0; i + lane < count; ++lane) few[lane] = codes[i + lane];
  hn::BlendedStore(parameters(value(few), i), hn::FirstN(kF32, count - i), kF32, out + i);
}

/// Groups of one element, `count` of them, a multiple of kLanes: a vector of scales.
template <class Value, class Affine>
HWY_INLINE void decode_elements(const GroupNumbers& numbers, const uint8_t* codes, size_t count, V no_offset,
                                float* out, const Value& value, const Affine& affine) {
  if (numbers.index == nullptr)
    return decode_run(codes, count, out, value, [&](V e, size_t i) HWY_ATTR {
      return affine(e, hn::LoadU(kF32, numbers.scales + i),
                    numbers.offsets == nullptr ? no_offset : hn::LoadU(kF32, numbers.offsets + i));
    });
  decode_run(codes, count, out, value, [&](V e, size_t i) HWY_ATTR {
    const auto index = hn::LoadU(kI32, numbers.index + i);
    return affine(e, hn::GatherIndex(kF32, numbers.scales, index),
                  numbers.offsets == nullptr ? no_offset : hn::GatherIndex(kF32, numbers.offsets, index));
  });
}

template <GroupDecoding::Element element, GroupDecoding::Form form>
HWY_INLINE void decode_groups_as(const GroupDecoding& d, const GroupNumbers& numbers, const uint8_t* codes, size_t size,
                                 size_t groups, float* out) {
  const ElementValues<element> value(d);
  const ToValues<form> affine = {hn::Set(kF32, d.factor)};
  const V no_offset = hn::Set(kF32, d.offset);
  const size_t elements = size == 1 ? groups / kLanes * kLanes : 0;
  decode_elements(numbers, codes, elements, no_offset, out, value, affine);
  for (size_t g = elements; g < groups; ++g) {
    const size_t number = numbers.index == nullptr ? g : static_cast<size_t>(numbers.index[g]);
    const V scale = hn::Set(kF32, numbers.scales[number]);
    const V offset = numbers.offsets == nullptr ? no_offset : hn::Set(kF32, numbers.offsets[number]);
    decode_run(codes + g * size, size, out + g * size, value,
               [&](V e, size_t) HWY_ATTR { return affine(e, scale, offset); });
  }
}

template <GroupDecoding::Element element>
HWY_INLINE void decode_groups_of(const GroupDecoding& d, const GroupNumbers& numbers, const uint8_t* codes, size_t size,
                                 size_t groups, float* out) {
  using Form = GroupDecoding::Form;
  switch (d.form) {
    case Form::scale:
      return decode_groups_as<element, Form::scale>(d, numbers, codes, size, groups, out);
    case Form::divide:
      return decode_groups_as<element, Form::divide>(d, numbers, codes, size, groups, out);
    case Form::subtract_scale:
      return decode_groups_as<element, Form::subtract_scale>(d, numbers, codes, size, groups, out);
    case Form::scale_add:
      return decode_groups_as<element, Form::scale_add>(d, numbers, codes, size, groups, out);
    case Form::scale_subtract:
      return decode_groups_as<element, Form::scale_subtract>(d, numbers, codes, size, groups, out);
  }
}

void decode_groups(const GroupDecoding& d, const GroupNumbers& numbers, const std::byte* codes, size_t size,
                   size_t groups, float* out) {
  using Element = GroupDecoding::Element;
  const auto* const from = reinterpret_cast<const uint8_t*>(codes);
  switch (d.element) {
    case Element::is_signed:
      return decode_groups_of<Element::is_signed>(d, numbers, from, size, groups, out);
    case Element::is_unsigned:
      return decode_groups_of<Element::is_unsigned>(d, numbers, from, size, groups, out);
    case Element::table16:
      return decode_groups_of<Element::table16>(d, numbers, from, size, groups, out);
    case Element::table256:
      return decode_groups_of<Element::table256>(d, numbers, from, size, groups, out);
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
