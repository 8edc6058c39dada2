// Compiled once per instruction set by Highway's foreach_target.h; those without a fused multiply-add are left out.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/kernels_simd.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "kernels/rows.hpp"

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
// Each instruction set compiles them anew.
#undef BITWRIGHT_KERNELS_DECODE_INL
#undef BITWRIGHT_KERNELS_ELEMENTWISE_INL
#undef BITWRIGHT_KERNELS_ENCODE_INL
#undef BITWRIGHT_KERNELS_FAKE_QUANTIZE_INL
#undef BITWRIGHT_KERNELS_LANES_INL
#undef BITWRIGHT_KERNELS_TILE_INL
#undef BITWRIGHT_KERNELS_VECTOR_INL
#undef BITWRIGHT_KERNELS_WEIGHTS_INL
#include "kernels/decode-inl.hpp"
#include "kernels/elementwise-inl.hpp"
#include "kernels/encode-inl.hpp"
#include "kernels/fake_quantize-inl.hpp"
#include "kernels/tile-inl.hpp"
#include "kernels/vector-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

constexpr KernelLevel level(std::string_view name, bool (*usable)()) {
  return {.name = name,
          .usable = usable,
          .multiply_tile = multiply_tile,
          .expand = expand,
          .multiply_vector = multiply_vector,
          .activate = activate,
          .activation_slope = activation_slope,
          .soft_cap = soft_cap,
          .softmax_terms = softmax_terms,
          .find_extremes = find_extremes,
          .search_ranges = search_ranges,
          .group_parameters = group_parameters,
          .encode_integers = encode_integers,
          .encode_table = encode_table,
          .decode_groups = decode_groups,
          .add_squares = add_squares,
          .fake_quantize_groups = fake_quantize_groups,
          .fake_quantize_gradients = fake_quantize_gradients};
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#if HWY_ONCE
namespace bitwright {

std::span<const KernelLevel> simd_kernel_levels() {
#if HWY_TARGETS & (HWY_AVX3 | HWY_AVX2)
  static constexpr KernelLevel levels[] = {
#if HWY_TARGETS & HWY_AVX3
    N_AVX3::level("avx512", [] { return (hwy::SupportedTargets() & HWY_AVX3) != 0; }),
#endif
#if HWY_TARGETS & HWY_AVX2
    N_AVX2::level("avx2", [] { return (hwy::SupportedTargets() & HWY_AVX2) != 0; }),
#endif
  };
  return levels;
#else
  return {};
#endif
}

}  // namespace bitwright
#endif
