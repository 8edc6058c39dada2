// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_ENCODE_INL
#define BITWRIGHT_KERNELS_ENCODE_INL

#include <algorithm>
#include <limits>

#include "kernels/encode.hpp"
#include "kernels/weights-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

/// Calls run(pointer to the first value), chosen once, outside the loops.
template <class Run>
HWY_INLINE auto with_stored(DType dtype, const std::byte* values, Run run) {
  if (dtype == DType::f32) return run(reinterpret_cast<const float*>(values));
  if (dtype == DType::f16) return run(reinterpret_cast<const hwy::float16_t*>(values));
  return run(reinterpret_cast<const hwy::bfloat16_t*>(values));
}

template <class T>
HWY_INLINE V read_values(const T* from) {
  return Plain<T>::read(from);
}

/// Fewer than kLanes values, the first again in the other lanes.
template <class T>
HWY_INLINE V read_few(const T* from, size_t count) {
  T few[kLanes];
  for (T& value : few) hwy::CopyBytes<sizeof(T)>(from, &value);
  for (size_t i = 1; i < count; ++i) hwy::CopyBytes<sizeof(T)>(from + i, &few[i]);
  return Plain<T>::read(few);
}

struct Extremes {
  V low, high;
  Words largest;  ///< magnitudes as bits: NaN and infinity are above all others

  static HWY_INLINE Extremes none() {
    const V infinity = hn::Set(kF32, std::numeric_limits<float>::infinity());
    return {infinity, hn::Neg(infinity), hn::Zero(kU32)};
  }
  HWY_INLINE void take(V v) {
    low = hn::Min(low, v);
    high = hn::Max(high, v);
    largest = hn::Max(largest, hn::BitCast(kU32, hn::Abs(v)));
  }
  HWY_INLINE bool finite() const { return hn::AllTrue(kU32, hn::Lt(largest, hn::Set(kU32, 0x7f800000))); }
};

template <class T>
HWY_INLINE bool find_extremes_of(const T* values, size_t count, Range& range) {
  Extremes a = Extremes::none(), b = a;
  size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    a.take(read_values(values + i));
    b.take(read_values(values + i + kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) a.take(read_values(values + i));
  if (i < count) a.take(read_few(values + i, count - i));
  a.largest = hn::Max(a.largest, b.largest);
  range.low = hn::GetLane(hn::MinOfLanes(kF32, hn::Min(a.low, b.low))) + 0.0f;
  range.high = hn::GetLane(hn::MaxOfLanes(kF32, hn::Max(a.high, b.high))) + 0.0f;
  return a.finite();
}

bool find_extremes(DType dtype, const std::byte* values, size_t count, Range& range) {
  return with_stored(dtype, values, [&](const auto* from) HWY_ATTR { return find_extremes_of(from, count, range); });
}

/// Scale and zero point of kLanes groups, as scheme/encode.cpp defines them.
struct ParameterLanes {
  const GroupEncoding& e;
  V levels, lowest, highest;
  explicit ParameterLanes(const GroupEncoding& encoding) : e(encoding) {
    levels = hn::Set(kF32, e.has_zero ? e.highest - e.lowest : e.scheme->element->full_scale);
    lowest = hn::Set(kF32, e.lowest);
    highest = hn::Set(kF32, e.highest);
  }

  HWY_INLINE V ideal(V low, V high) const {
    const V zero = hn::Zero(kF32);
    const V span = e.has_zero ? hn::Sub(hn::Max(high, zero), hn::Min(low, zero)) : hn::Max(hn::Abs(low), hn::Abs(high));
    return hn::Div(span, levels);
  }

  /// As its type holds it.
  HWY_INLINE V stored(V ideal) const {
    if (e.scale_dtype == DType::f16) {
      const hn::Rebind<hwy::float16_t, F32> half;
      return hn::PromoteTo(kF32, hn::DemoteTo(half, ideal));
    }
    if (e.scale_dtype == DType::bf16) {
      const auto bits = hn::BitCast(kU32, ideal);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(kU32, 1));
      const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(kU32, 0x7fff)));
      return hn::BitCast(kF32, hn::And(rounded, hn::Set(kU32, 0xffff0000)));
    }
    return ideal;
  }

  HWY_INLINE V zero(V low, V s) const {
    const V none = hn::Zero(kF32);
    if (!e.has_zero) return none;
    const V ideal = hn::Round(hn::Sub(lowest, hn::Div(hn::Min(low, none), s)));
    const V clamped = hn::Min(hn::Max(ideal, lowest), highest);
    return hn::IfThenElse(hn::Eq(s, none), hn::Max(lowest, none), clamped);
  }
};

void group_parameters(const GroupEncoding& e, const Range* ranges, size_t groups, float* scales, float* zeros) {
  const ParameterLanes parameters(e);
  for (size_t g = 0; g < groups; g += kLanes) {
    V low, high;
    hn::LoadInterleaved2(kF32, &ranges[g].low, low, high);
    const V s = parameters.stored(parameters.ideal(low, high));
    hn::StoreU(s, kF32, scales + g);
    hn::StoreU(parameters.zero(low, s), kF32, zeros + g);
  }
}

/// least_squares_range of kLanes groups at once, a group a lane.
class RangeSearchLanes {
 public:
  /// values: [size][kLanes].
  RangeSearchLanes(const GroupEncoding& e, const float* values, size_t size, V low, V high)
      : parameters_(e), values_(values), size_(size), low_(low), high_(high), whole_(parameters_.ideal(low, high)) {}

  HWY_INLINE void run(Range* ranges) {
    using R = RangeSearch;
    best_ = hn::Zero(kF32);
    least_ = error(best_);
    auto searching = hn::FirstN(kF32, kLanes);
    for (int k = R::kStride; k < R::kReach; k += R::kStride) {
      const V candidate = hn::Set(kF32, static_cast<float>(k)), e = error(candidate);
      keep(candidate, e, hn::And(searching, hn::Lt(e, least_)));
      searching = hn::AndNot(hn::Gt(e, hn::Mul(hn::Set(kF32, R::kHopeless), least_)), searching);
      if (hn::AllFalse(kF32, searching)) break;
    }
    for (const int step : R::kRefinements) {
      const V centre = best_, distance = hn::Set(kF32, static_cast<float>(step));
      attempt(hn::Max(hn::Sub(centre, distance), hn::Zero(kF32)));
      attempt(hn::Add(centre, distance));
    }
    const V r = share(best_);
    hn::StoreInterleaved2(hn::Mul(low_, r), hn::Mul(high_, r), kF32, &ranges->low);
  }

 private:
  static HWY_INLINE V share(V k) {
    return hn::Sub(hn::Set(kF32, 1.0f), hn::Mul(hn::Set(kF32, RangeSearch::kStep), k));  // exact
  }
  HWY_INLINE void keep(V k, V e, decltype(hn::Lt(V(), V())) better) {
    least_ = hn::IfThenElse(better, e, least_);
    best_ = hn::IfThenElse(better, k, best_);
  }
  HWY_INLINE void attempt(V k) {
    const V e = error(k);
    keep(k, e, hn::Lt(e, least_));
  }

  HWY_INLINE V error(V k) const {
    using R = RangeSearch;
    const V r = share(k), scale = parameters_.stored(hn::Mul(whole_, r));
    const V inverse =
        hn::IfThenZeroElse(hn::Lt(scale, hn::Set(kF32, R::kLeastScale)), hn::Div(hn::Set(kF32, 1.0f), scale));
    const V rounder = hn::Set(kF32, R::kRound);
    const V zero = parameters_.e.has_zero ? narrowed_zero(r, inverse) : hn::Zero(kF32);
    const V lowest = hn::Add(rounder, hn::Sub(parameters_.lowest, zero));
    const V highest = hn::Add(rounder, hn::Sub(parameters_.highest, zero));
    const V total =
        size_ <= R::kPiece ? piece(0, size_, scale, inverse, lowest, highest) : pieces(scale, inverse, lowest, highest);
    const V infinity = hn::Set(kF32, std::numeric_limits<float>::infinity());
    return hn::IfThenElse(hn::Lt(scale, infinity), total, infinity);
  }

  HWY_INLINE V narrowed_zero(V r, V inverse) const {
    const V low = hn::Mul(hn::Mul(hn::Min(low_, hn::Zero(kF32)), r), inverse);
    return hn::Min(hn::Max(hn::Round(hn::Sub(parameters_.lowest, low)), parameters_.lowest), parameters_.highest);
  }

  HWY_INLINE V piece(size_t begin, size_t end, V scale, V inverse, V lowest, V highest) const {
    const V rounder = hn::Set(kF32, RangeSearch::kRound);
    const auto add = [&](size_t i, V sum) HWY_ATTR {
      const V v = hn::LoadU(kF32, values_ + i * kLanes);
      const V rounded = hn::Sub(hn::Min(hn::Max(hn::MulAdd(v, inverse, rounder), lowest), highest), rounder);
      const V e = hn::NegMulAdd(rounded, scale, v);
      return hn::MulAdd(e, e, sum);
    };
    V even = hn::Zero(kF32), odd = even;
    size_t i = begin;
    for (; i + 2 <= end; i += 2) {
      even = add(i, even);
      odd = add(i + 1, odd);
    }
    if (i < end) even = add(i, even);
    return hn::Add(even, odd);
  }

  HWY_INLINE V pieces(V scale, V inverse, V lowest, V highest) const {
    HWY_ALIGN float sums[kLanes];
    double totals[kLanes] = {};
    for (size_t begin = 0; begin < size_; begin += RangeSearch::kPiece) {
      const size_t end = HWY_MIN(size_, begin + RangeSearch::kPiece);
      hn::Store(piece(begin, end, scale, inverse, lowest, highest), kF32, sums);
      for (size_t lane = 0; lane < kLanes; ++lane) totals[lane] += static_cast<double>(sums[lane]);
    }
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] = static_cast<float>(totals[lane]);
    return hn::Load(kF32, sums);
  }

  ParameterLanes parameters_;
  const float* values_;
  size_t size_;
  V low_, high_, whole_, best_, least_;
};

/// out[i * kLanes + lane] = value i of group `lane`; the last group again where there are fewer.
template <class T>
HWY_INLINE void transpose_groups(const T* values, size_t size, size_t groups, float* out) {
  HWY_ALIGN int32_t starts[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane)
    starts[lane] = static_cast<int32_t>(HWY_MIN(lane, groups - 1) * size * sizeof(T));
  const auto at = hn::Load(kI32, starts);
  const auto* const bytes = reinterpret_cast<const uint8_t*>(values);
  size_t i = 0;
  if constexpr (sizeof(T) == 4) {
    for (; i < size; ++i)
      hn::StoreU(hn::GatherOffset(kF32, reinterpret_cast<const float*>(bytes + 4 * i), at), kF32, out + i * kLanes);
  } else {
    for (; i + 2 <= size; i += 2) {  // two values a gathered word
      const auto pair = hn::GatherOffset(kU32, reinterpret_cast<const uint32_t*>(bytes + 2 * i), at);
      V first, second;
      if constexpr (std::is_same_v<T, hwy::bfloat16_t>) {
        first = hn::BitCast(kF32, hn::ShiftLeft<16>(pair));
        second = hn::BitCast(kF32, hn::And(pair, hn::Set(kU32, 0xffff0000)));
      } else {
        const hn::Rebind<uint16_t, F32> narrow;
        const hn::Rebind<hwy::float16_t, F32> half;
        const auto low = hn::And(pair, hn::Set(kU32, 0xffff)), high = hn::ShiftRight<16>(pair);
        first = hn::PromoteTo(kF32, hn::BitCast(half, hn::DemoteTo(narrow, hn::BitCast(kI32, low))));
        second = hn::PromoteTo(kF32, hn::BitCast(half, hn::DemoteTo(narrow, hn::BitCast(kI32, high))));
      }
      hn::StoreU(first, kF32, out + i * kLanes);
      hn::StoreU(second, kF32, out + (i + 1) * kLanes);
    }
  }
  for (; i < size; ++i)
    for (size_t lane = 0; lane < kLanes; ++lane) {
      T few[kLanes] = {};
      hwy::CopyBytes<sizeof(T)>(values + HWY_MIN(lane, groups - 1) * size + i, few);
      out[i * kLanes + lane] = hn::GetLane(read_values(few));
    }
}

template <class T>
HWY_INLINE bool search_ranges_of(const GroupEncoding& e, const T* values, size_t size, size_t groups, float* scratch,
                                 Range* ranges) {
  for (size_t g = 0; g < groups; g += kLanes) {
    const size_t count = HWY_MIN(kLanes, groups - g);
    transpose_groups(values + g * size, size, count, scratch);
    Extremes extremes = Extremes::none();
    for (size_t i = 0; i < size; ++i) extremes.take(hn::LoadU(kF32, scratch + i * kLanes));
    if (!extremes.finite()) return false;
    const V zero = hn::Zero(kF32);
    RangeSearchLanes search(e, scratch, size, hn::Add(extremes.low, zero), hn::Add(extremes.high, zero));
    Range found[kLanes];
    search.run(found);
    for (size_t lane = 0; lane < count; ++lane) ranges[g + lane] = found[lane];
  }
  return true;
}

bool search_ranges(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                   float* scratch, Range* ranges) {
  return with_stored(dtype, values, [&](const auto* from) HWY_ATTR {
    return search_ranges_of(e, from, size, groups, scratch, ranges);
  });
}

/// use(vector, out, count) for the values of one group, at most kLanes at a time.
template <class T, class Use>
HWY_INLINE void for_each_in_group(const T* values, size_t size, std::byte* codes, Use use) {
  auto* out = reinterpret_cast<uint8_t*>(codes);
  const hn::Rebind<uint8_t, F32> bytes;
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) hn::StoreU(use(read_values(values + i)), bytes, out + i);
  if (i == size) return;
  uint8_t few[kLanes];
  hn::StoreU(use(read_few(values + i, size - i)), bytes, few);
  for (size_t lane = 0; i + lane < size; ++lane) out[i + lane] = few[lane];
}

HWY_INLINE auto to_bytes(hn::Vec<decltype(kI32)> codes) { return hn::U8FromU32(hn::BitCast(kU32, codes)); }

/// v / scale, correctly rounded, by two corrections of v * (1 / scale) (P. Markstein, IA-64 and elementary functions:
/// the remainder is exact and the reciprocal correctly rounded). Far from overflow and underflow only; quotients below
/// 1/4 may be off in the last place.
struct Quotient {
  V scale, inverse;
  static bool holds(float s) { return s == 0 || (s >= 0x1p-90f && s <= 0x1p+90f); }
  explicit HWY_INLINE Quotient(float s) : scale(hn::Set(kF32, s)), inverse(hn::Set(kF32, s == 0 ? 0 : 1 / s)) {}
  HWY_INLINE V operator()(V v) const {
    V q = hn::Mul(v, inverse);
    q = hn::MulAdd(hn::NegMulAdd(q, scale, v), inverse, q);
    return hn::MulAdd(hn::NegMulAdd(q, scale, v), inverse, q);
  }
};

template <class T>
HWY_INLINE void encode_integers_of(const GroupEncoding& e, DType dtype, const T* values, size_t size, size_t groups,
                                   const float* scales, const float* zeros, std::byte* codes) {
  const auto mask = hn::Set(kI32, (1 << e.scheme->element->bits) - 1);
  for (size_t g = 0; g < groups; ++g, values += size, codes += size) {
    const float z = zeros == nullptr ? 0 : zeros[g];
    if (!Quotient::holds(scales[g])) {
      bitwright::encode_integers(e, dtype, reinterpret_cast<const std::byte*>(values), size, 1, scales + g, &z, codes);
      continue;
    }
    const Quotient quotient(scales[g]);
    const V lowest = hn::Set(kF32, e.lowest - z), highest = hn::Set(kF32, e.highest - z);
    const auto zero = hn::Set(kI32, static_cast<int32_t>(z));
    for_each_in_group(values, size, codes, [&](V v) HWY_ATTR {
      const V clamped = hn::Min(hn::Max(quotient(v), lowest), highest);
      return to_bytes(hn::And(hn::Add(hn::NearestInt(clamped), zero), mask));
    });
  }
}

void encode_integers(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                     const float* scales, const float* zeros, std::byte* codes) {
  with_stored(dtype, values, [&](const auto* from) HWY_ATTR {
    encode_integers_of(e, dtype, from, size, groups, scales, zeros, codes);
  });
}

template <class T>
HWY_INLINE void encode_table_of(const GroupEncoding& e, const T* values, size_t size, size_t groups,
                                const float* scales, std::byte* codes) {
  const bool rising = std::ranges::is_sorted(e.table_words);  // then a code is its rank
  for (size_t g = 0; g < groups; ++g, values += size, codes += size) {
    const V one = hn::Set(kF32, 1.0f), minus_one = hn::Set(kF32, -1.0f);
    const V inverse = hn::Set(kF32, scales[g] == 0 ? 0 : 1.0f / HWY_MAX(scales[g], 1e-38f));
    for_each_in_group(values, size, codes, [&](V v) HWY_ATTR {
      const V x = hn::Min(hn::Max(hn::Mul(v, inverse), minus_one), one);
      auto rank = hn::Zero(kI32);
#pragma GCC unroll 15
      for (const float midpoint : e.midpoints)
        rank = hn::Sub(rank, hn::VecFromMask(kI32, hn::RebindMask(kI32, hn::Gt(x, hn::Set(kF32, midpoint)))));
      return to_bytes(rising ? rank : hn::GatherIndex(kI32, e.table_words.data(), rank));
    });
  }
}

void encode_table(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                  const float* scales, std::byte* codes) {
  with_stored(dtype, values, [&](const auto* from) HWY_ATTR { encode_table_of(e, from, size, groups, scales, codes); });
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
