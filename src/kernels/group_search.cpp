// Compiled once per instruction set by Highway's foreach_target.h, like kernels_simd.cpp.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/group_search.cpp"
#include "kernels/group_search.hpp"

#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.hpp"
#include "kernels/codebook_search.hpp"

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr uint32_t kTag = 127;

struct Lanes {
  using D = hn::CappedTag<float, kPanel>;
  using V = hn::Vec<D>;
  using M = hn::Mask<D>;
  static constexpr size_t kCount = hn::MaxLanes(D());
  static_assert(kCount == kPanel || 2 * kCount == kPanel);
  static HWY_INLINE V set(float x) { return hn::Set(D(), x); }
  static HWY_INLINE V load(const float* from) { return hn::LoadU(D(), from); }
  static HWY_INLINE void store(V v, float* to) { hn::StoreU(v, D(), to); }
  static HWY_INLINE void store_code(V v, uint8_t* to) {
    const hn::Rebind<uint8_t, D> bytes;
    hn::StoreU(hn::DemoteTo(bytes, hn::ConvertTo(hn::Rebind<int32_t, D>(), v)), bytes, to);
  }
  using DI = hn::Rebind<int32_t, D>;
  using I = hn::Vec<DI>;
  static HWY_INLINE I zero_index() { return hn::Zero(DI()); }
  static HWY_INLINE I multiples(size_t of) { return hn::Mul(hn::Iota(DI(), 0), hn::Set(DI(), static_cast<int>(of))); }
  static HWY_INLINE V gather(const float* from, I at) { return hn::GatherIndex(D(), from, at); }
  static HWY_INLINE V to_float(I at) { return hn::ConvertTo(D(), at); }
  static HWY_INLINE V lookup(const float* table, I at) {
    if constexpr (kCount == kPanel) {
      return hn::TableLookupLanes(load(table), hn::IndicesFromVec(D(), at));
    } else {
      const auto within = hn::IndicesFromVec(D(), hn::And(at, hn::Set(DI(), kCount - 1)));
      const auto upper = hn::RebindMask(D(), hn::Gt(at, hn::Set(DI(), kCount - 1)));
      return hn::IfThenElse(upper, hn::TableLookupLanes(load(table + kCount), within),
                            hn::TableLookupLanes(load(table), within));
    }
  }
  /// at + step where the point before that lies below v.
  static HWY_INLINE I advance(I at, int step, const float* points, V v) {
    const V point = lookup(points, hn::Add(at, hn::Set(DI(), step - 1)));
    return hn::IfThenElse(hn::RebindMask(DI(), hn::Lt(point, v)), hn::Add(at, hn::Set(DI(), step)), at);
  }
  /// x, a number up to 127 in its lowest bits; that number.
  static HWY_INLINE V tag(V x, uint32_t number) {
    const hn::Rebind<uint32_t, D> bits;
    return hn::BitCast(D(), hn::Or(hn::AndNot(hn::Set(bits, kTag), hn::BitCast(bits, x)), hn::Set(bits, number)));
  }
  static HWY_INLINE V tag_of(V x) {
    return hn::ConvertTo(D(), hn::And(hn::BitCast(DI(), x), hn::Set(DI(), static_cast<int32_t>(kTag))));
  }
  static HWY_INLINE V add(V a, V b) { return hn::Add(a, b); }
  static HWY_INLINE V sub(V a, V b) { return hn::Sub(a, b); }
  static HWY_INLINE V mul(V a, V b) { return hn::Mul(a, b); }
  static HWY_INLINE V div(V a, V b) { return hn::Div(a, b); }
  static HWY_INLINE V mul_add(V a, V b, V c) { return hn::MulAdd(a, b, c); }
  static HWY_INLINE V mul_sub(V a, V b, V c) { return hn::MulSub(a, b, c); }
  static HWY_INLINE V min(V a, V b) { return hn::Min(a, b); }
  static HWY_INLINE V max(V a, V b) { return hn::Max(a, b); }
  static HWY_INLINE V round(V a) { return hn::Round(a); }
  static HWY_INLINE M less(V a, V b) { return hn::Lt(a, b); }
  static HWY_INLINE M less_equal(V a, V b) { return hn::Le(a, b); }
  static HWY_INLINE M equal(V a, V b) { return hn::Eq(a, b); }
  static HWY_INLINE M both(M a, M b) { return hn::And(a, b); }
  static HWY_INLINE V select(M m, V yes, V no) { return hn::IfThenElse(m, yes, no); }
};

// clang-format off
#include "kernels/group_search-inl.hpp"
#include "kernels/codebook_search-inl.hpp"
// clang-format on

constexpr std::string_view kName = HWY_TARGET == HWY_AVX2 ? "avx2" : "avx512";

}  // namespace

extern const GroupSearch search_row;
const GroupSearch search_row = GroupLoops<Lanes>::row(kName);
extern const CodebookSearch codebook_row;
const CodebookSearch codebook_row = CodebookLoops<Lanes>::row(kName);

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#if HWY_ONCE
namespace bitwright {
namespace {

constexpr uint32_t kTag = 127;

/// One lane: the definition.
struct OneLane {
  using V = float;
  static constexpr size_t kCount = 1;
  static V set(float x) { return x; }
  static V load(const float* from) { return *from; }
  static void store(V v, float* to) { *to = v; }
  static void store_code(V v, uint8_t* to) { *to = static_cast<uint8_t>(v); }
  using I = int;
  static I zero_index() { return 0; }
  static I multiples(size_t /*of*/) { return 0; }
  static V gather(const float* from, I at) { return from[at]; }
  static V to_float(I at) { return static_cast<float>(at); }
  static V lookup(const float* table, I at) { return table[at]; }
  static I advance(I at, int step, const float* points, V v) { return points[at + step - 1] < v ? at + step : at; }
  static V tag(V x, uint32_t number) { return std::bit_cast<float>((std::bit_cast<uint32_t>(x) & ~kTag) | number); }
  static V tag_of(V x) { return static_cast<float>(std::bit_cast<uint32_t>(x) & kTag); }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V mul_add(V a, V b, V c) { return std::fma(a, b, c); }
  static V mul_sub(V a, V b, V c) { return std::fma(a, b, -c); }
  static V min(V a, V b) { return a < b ? a : b; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V round(V a) { return std::nearbyint(a); }
  static bool less(V a, V b) { return a < b; }
  static bool less_equal(V a, V b) { return a <= b; }
  static bool equal(V a, V b) { return a == b; }
  static bool both(bool a, bool b) { return a && b; }
  static V select(bool m, V yes, V no) { return m ? yes : no; }
};

// clang-format off
#include "kernels/group_search-inl.hpp"
#include "kernels/codebook_search-inl.hpp"
// clang-format on

constexpr GroupSearch kScalar = GroupLoops<OneLane>::row("scalar");
constexpr CodebookSearch kScalarCodebooks = CodebookLoops<OneLane>::row("scalar");

}  // namespace

const GroupSearch& group_search(const KernelLevel& level) {
#if HWY_TARGETS & HWY_AVX3
  if (level.name == N_AVX3::search_row.name) return N_AVX3::search_row;
#endif
#if HWY_TARGETS & HWY_AVX2
  if (level.name == N_AVX2::search_row.name) return N_AVX2::search_row;
#endif
  BW_ASSERT(level.name == kScalar.name);
  return kScalar;
}

const CodebookSearch& codebook_search(const KernelLevel& level) {
#if HWY_TARGETS & HWY_AVX3
  if (level.name == N_AVX3::codebook_row.name) return N_AVX3::codebook_row;
#endif
#if HWY_TARGETS & HWY_AVX2
  if (level.name == N_AVX2::codebook_row.name) return N_AVX2::codebook_row;
#endif
  BW_ASSERT(level.name == kScalarCodebooks.name);
  return kScalarCodebooks;
}

}  // namespace bitwright
#endif
