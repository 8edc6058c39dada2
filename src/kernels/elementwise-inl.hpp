// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_ELEMENTWISE_INL
#define BITWRIGHT_KERNELS_ELEMENTWISE_INL

#include "kernels/exponential.hpp"
#include "kernels/fixed_lanes.hpp"
#include "kernels/lanes-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

/// exponential() of exponential.hpp, lane by lane and step by step.
HWY_INLINE V exponential_lanes(V x) {
  const auto set = [](float value) HWY_ATTR { return hn::Set(kF32, value); };
  const V low = set(Exponential::kLowest), high = set(Exponential::kHighest);
  V clamped = hn::IfThenElse(hn::Lt(x, low), low, x);
  clamped = hn::IfThenElse(hn::Lt(high, clamped), high, clamped);
  const V shifted = hn::Add(hn::Mul(clamped, set(Exponential::kLog2E)), set(Exponential::kRounder));
  const V n = hn::Sub(shifted, set(Exponential::kRounder));
  const V r = hn::Sub(hn::Sub(clamped, hn::Mul(n, set(Exponential::kLn2High))), hn::Mul(n, set(Exponential::kLn2Low)));
  V p = set(Exponential::kCoefficients[0]);
  for (size_t i = 1; i < std::size(Exponential::kCoefficients); ++i)
    p = hn::Add(hn::Mul(p, r), set(Exponential::kCoefficients[i]));
  p = hn::Add(hn::Add(hn::Mul(p, hn::Mul(r, r)), r), set(1.0f));
  const auto exponent = hn::Sub(hn::BitCast(kI32, shifted), hn::BitCast(kI32, set(Exponential::kRounder)));
  const auto half = hn::ShiftRight<1>(exponent);
  const auto power = [](auto e)
                         HWY_ATTR { return hn::BitCast(kF32, hn::ShiftLeft<23>(hn::Add(e, hn::Set(kI32, 127)))); };
  return hn::Mul(hn::Mul(p, power(half)), power(hn::Sub(exponent, half)));
}

/// use(i, part, mask) for the vectors of `count` numbers: those at i, `part` of each kPanel neighbours; the mask has
/// the lanes before the end.
template <class Use>
HWY_INLINE void for_each_vector(size_t count, Use use) {
  size_t i = 0;
  const auto all = hn::FirstN(kF32, kLanes);
  for (; i + kPanel <= count; i += kPanel)
    for (size_t part = 0; part < kParts; ++part) use(i + part * kLanes, part, all);
  for (size_t part = 0; i + part * kLanes < count; ++part)
    use(i + part * kLanes, part, hn::FirstN(kF32, HWY_MIN(kLanes, count - i - part * kLanes)));
}

void silu_multiply(float* gate, const float* up, size_t count) {
  for_each_vector(count, [&](size_t i, size_t, auto mask) HWY_ATTR {
    const V g = hn::MaskedLoad(mask, kF32, gate + i), one = hn::Set(kF32, 1.0f);
    const V silu = hn::Div(g, hn::Add(one, exponential_lanes(hn::Neg(g))));
    hn::BlendedStore(hn::Mul(silu, hn::MaskedLoad(mask, kF32, up + i)), mask, kF32, gate + i);
  });
}

float softmax_terms(float* scores, size_t count, float scale) {
  HWY_ALIGN float lanes[kPanel];
  V largest[kParts], sum[kParts];
  for (size_t part = 0; part < kParts; ++part) {
    largest[part] = hn::Set(kF32, scores[0] * scale);
    sum[part] = hn::Zero(kF32);
  }
  for_each_vector(count, [&](size_t i, size_t part, auto mask) HWY_ATTR {
    const V s = hn::Mul(hn::MaskedLoad(mask, kF32, scores + i), hn::Set(kF32, scale));
    hn::BlendedStore(s, mask, kF32, scores + i);
    const V larger = hn::IfThenElse(hn::Lt(largest[part], s), s, largest[part]);
    largest[part] = hn::IfThenElse(mask, larger, largest[part]);
  });
  for (size_t part = 0; part < kParts; ++part) hn::Store(largest[part], kF32, lanes + part * kLanes);
  const V top = hn::Set(kF32, merge_lanes(lanes, larger_of));
  for_each_vector(count, [&](size_t i, size_t part, auto mask) HWY_ATTR {
    const V term = exponential_lanes(hn::Sub(hn::MaskedLoad(mask, kF32, scores + i), top));
    hn::BlendedStore(term, mask, kF32, scores + i);
    sum[part] = hn::IfThenElse(mask, hn::Add(sum[part], term), sum[part]);
  });
  for (size_t part = 0; part < kParts; ++part) hn::Store(sum[part], kF32, lanes + part * kLanes);
  return 1 / merge_lanes(lanes, sum_of);
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
