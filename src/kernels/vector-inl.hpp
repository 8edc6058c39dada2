// Part of kernels_simd.cpp: included once per instruction set.
#ifndef BITWRIGHT_KERNELS_VECTOR_INL
#define BITWRIGHT_KERNELS_VECTOR_INL

#include <utility>

#include "kernels/weights-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace bitwright::HWY_NAMESPACE {

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
      elements.each(begin, end,
                    [&](size_t k, V e) HWY_ATTR { hn::StoreU(parameters(e), kF32, column + (k - k_begin) * kPanel); });
    }
  }
}

void expand(const PackedMatrix& w, size_t panel, size_t k_begin, size_t k_end, float* out) {
  with_types(w,
             [&]<class Element, class Affinity>() { expand_panel<Element, Affinity>(w, panel, k_begin, k_end, out); });
}

// A sum is a chain of additions, so that several go side by side, some columns of each in turn.
constexpr size_t kChains = 4;
constexpr size_t kTurn = 32;

/// One sum a vector of rows: sizeof...(C) of them, from vector `first` on, counted through all panels.
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
        elements[c].each(begin, end,
                         [&](size_t k, V e) HWY_ATTR { sum = hn::MulAdd(hn::Set(kF32, x[k]), parameters(e), sum); });
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
  for (; v < panel_end * kParts; ++v) multiply_chains<Element, Affinity>(w, v, x, y, std::make_index_sequence<1>());
}

void multiply_vector(const PackedMatrix& w, size_t panel_begin, size_t panel_end, const float* x, float* y) {
  with_types(
      w, [&]<class Element, class Affinity>() { multiply_panels<Element, Affinity>(w, panel_begin, panel_end, x, y); });
}

}  // namespace bitwright::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
