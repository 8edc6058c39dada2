#pragma once

#include <cstddef>

#include "kernels/kernel_level.hpp"

namespace bitwright {

// Sums and maxima over a row: element i goes to lane i % kPanel, and the lanes are merged pairwise at the end. An order
// that no vector width changes.

inline float sum_of(float a, float b) { return a + b; }
inline float larger_of(float a, float b) { return a < b ? b : a; }

/// Overwrites `lanes`.
template <class Merge>
float merge_lanes(float (&lanes)[kPanel], Merge merge) {
  for (size_t half = kPanel / 2; half > 0; half /= 2)
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] = merge(lanes[lane], lanes[lane + half]);
  return lanes[0];
}

}  // namespace bitwright
