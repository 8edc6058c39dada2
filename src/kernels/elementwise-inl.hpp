// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_ELEMENTWISE_INL
#define BITWRIGHT_KERNELS_ELEMENTWISE_INL

#include "kernels/elementwise.hpp"
#include "kernels/exponential.hpp"
#include "kernels/fixed_lanes.hpp"
#include "kernels/lanes-inl.hpp"
#include "kernels/tanh_erf.hpp"

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

template <size_t n>
HWY_INLINE V polynomial_lanes(V z, const float (&coefficients)[n]) {
  V p = hn::Set(kF32, coefficients[0]);
  for (size_t i = 1; i < n; ++i) p = hn::Add(hn::Mul(p, z), hn::Set(kF32, coefficients[i]));
  return p;
}

// As tanh_erf.hpp has them, lane by lane and step by step.
HWY_INLINE V tanh_lanes(V x) {
  const V a = hn::Abs(x), z = hn::Mul(x, x), one = hn::Set(kF32, 1.0f), two = hn::Set(kF32, 2.0f);
  const V small = hn::Add(hn::Mul(hn::Mul(polynomial_lanes(z, Tanh::kCoefficients), z), x), x);
  const V large = hn::Sub(one, hn::Div(two, hn::Add(exponential_lanes(hn::Mul(two, a)), one)));
  return hn::IfThenElse(hn::Lt(a, hn::Set(kF32, Tanh::kSmall)), small, hn::CopySign(large, x));
}

HWY_INLINE V erf_lanes(V x) {
  const V a = hn::Abs(x), one = hn::Set(kF32, 1.0f);
  const V small = hn::Mul(x, polynomial_lanes(hn::Mul(x, x), Erf::kSmall));
  const V r = hn::Div(one, a), y = hn::Mul(r, r);
  const V q = hn::IfThenElse(hn::Lt(a, hn::Set(kF32, 2.0f)), polynomial_lanes(y, Erf::kMiddle),
                             polynomial_lanes(y, Erf::kLarge));
  const V large = hn::Sub(one, hn::Mul(hn::Mul(exponential_lanes(hn::Neg(hn::Mul(a, a))), r), q));
  return hn::IfThenElse(hn::Lt(a, one), small, hn::CopySign(large, x));
}

HWY_INLINE V half_gate(V x, V t) {  // x / 2 (1 + t)
  return hn::Mul(hn::Mul(x, hn::Set(kF32, 0.5f)), hn::Add(hn::Set(kF32, 1.0f), t));
}

template <class Function>
HWY_INLINE void apply_lanes(float* x, const float* factor, size_t count, Function function) {
  for_each_vector(count, [&](size_t i, size_t, auto mask) HWY_ATTR {
    V y = function(hn::MaskedLoad(mask, kF32, x + i));
    if (factor != nullptr) y = hn::Mul(y, hn::MaskedLoad(mask, kF32, factor + i));
    hn::BlendedStore(y, mask, kF32, x + i);
  });
}

void activate(Activation activation, float* x, const float* factor, size_t count) {
  switch (activation) {
    case Activation::silu:
      return apply_lanes(x, factor, count, [](V v) HWY_ATTR {
        return hn::Div(v, hn::Add(hn::Set(kF32, 1.0f), exponential_lanes(hn::Neg(v))));
      });
    case Activation::gelu:
      return apply_lanes(x, factor, count, [](V v) HWY_ATTR {
        return half_gate(v, erf_lanes(hn::Mul(v, hn::Set(kF32, Gelu::kSqrtHalf))));
      });
    case Activation::gelu_tanh:
      return apply_lanes(x, factor, count, [](V v) HWY_ATTR {
        const V cubic = hn::Mul(hn::Mul(v, v), hn::Set(kF32, Gelu::kCubic));
        const V outer = hn::Mul(v, hn::Set(kF32, Gelu::kSqrt2OverPi));
        return half_gate(v, tanh_lanes(hn::Mul(outer, hn::Add(hn::Set(kF32, 1.0f), cubic))));
      });
  }
}

HWY_INLINE V bounded_lanes(V x) {
  const V far = hn::Set(kF32, Gelu::kFar);
  return hn::IfThenElse(hn::Lt(hn::Abs(x), far), x, hn::CopySign(far, x));
}

void activation_slope(Activation activation, float* x, size_t count) {
  const V one = hn::Set(kF32, 1.0f), half = hn::Set(kF32, 0.5f);
  switch (activation) {
    case Activation::silu:
      return apply_lanes(x, nullptr, count, [&](V v) HWY_ATTR {
        const V s = hn::Div(one, hn::Add(one, exponential_lanes(hn::Neg(v))));
        return hn::Mul(s, hn::Add(one, hn::Mul(v, hn::Sub(one, s))));
      });
    case Activation::gelu:
      return apply_lanes(x, nullptr, count, [&](V v) HWY_ATTR {
        const V below = hn::Mul(half, hn::Add(one, erf_lanes(hn::Mul(v, hn::Set(kF32, Gelu::kSqrtHalf)))));
        const V bounded = bounded_lanes(v);
        const V e = exponential_lanes(hn::Mul(hn::Mul(bounded, bounded), hn::Set(kF32, -0.5f)));
        return hn::Add(below, hn::Mul(hn::Mul(bounded, e), hn::Set(kF32, Gelu::kSqrtHalfOverPi)));
      });
    case Activation::gelu_tanh:
      return apply_lanes(x, nullptr, count, [&](V v) HWY_ATTR {
        const V bounded = bounded_lanes(v), root = hn::Set(kF32, Gelu::kSqrt2OverPi);
        const V square = hn::Mul(hn::Mul(bounded, bounded), hn::Set(kF32, Gelu::kCubic));
        const V t = tanh_lanes(hn::Mul(hn::Mul(bounded, root), hn::Add(one, square)));
        const V inner = hn::Mul(root, hn::Add(one, hn::Mul(square, hn::Set(kF32, 3.0f))));
        const V steep = hn::Mul(hn::Mul(hn::Mul(half, bounded), hn::Sub(one, hn::Mul(t, t))), inner);
        return hn::Add(hn::Mul(half, hn::Add(one, t)), steep);
      });
  }
}

void soft_cap(float* x, size_t count, float scale, float cap) {
  const float inner = scale / cap;
  apply_lanes(x, nullptr, count,
              [&](V v) HWY_ATTR { return hn::Mul(tanh_lanes(hn::Mul(v, hn::Set(kF32, inner))), hn::Set(kF32, cap)); });
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
