#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kernel_level.hpp"

namespace bitwright {

/// The whole numbers [low, high], or the 16 rising values of a table, each a code from 0 on.
struct CodeGrid {
  float low, high;
  const float* table = nullptr;      ///< [16]
  const float* midpoints = nullptr;  ///< [16], halfway between neighbours, the last infinite
};

/// kPanel groups of `size` values with the weight of each one's squared error: [size][kPanel], a group a lane.
struct GroupPanel {
  const float *values, *weights;  ///< weights: null: all 1
  size_t size;
};

/// Ranges that are tried for a group: its codes reach from a base to its highest value stretched by first + i * step
/// levels, i below `steps` (a multiple of 4). The base is its lowest value and, where there are two, half a level more.
struct RangeGrid {
  float first, step;
  int steps, bases = 1;
};

/// Of each lane: sums over its group of w, w x, w e, w e^2 and w x e.
struct GroupSums {
  float w[kPanel], x[kPanel], e[kPanel], ee[kPanel], xe[kPanel];
};

/// Of each lane: whole numbers that scale and minimum are made of, what those are multiplied by, and the weighted
/// squared error with the codes that follow.
struct ScaleCodes {
  float scale[kPanel], minimum[kPanel], scale_unit[kPanel], minimum_unit[kPanel], error[kPanel];
};

/// The innermost loops of the search for scales: values are scale * e - minimum, e the nearest of the grid. A row for
/// each KernelLevel, by its name. Every row gives the same bits.
struct GroupSearch {
  std::string_view name;
  /// panel = kPanel groups of `size` values that lie one after the other.
  void (*gather)(const float* groups, size_t size, float* panel);
  /// The scale and the minimum (not below 0) of least error, the codes [0, levels] chosen by the ranges of `grid`.
  void (*fit_affine)(const GroupPanel& panel, float levels, const RangeGrid& grid, float* scale, float* minimum);
  /// The scale of least error without a minimum; negative ones are tried too. The grid's lowest or highest level meets
  /// the extreme, stretched by first + i * step levels.
  void (*fit_scale)(const GroupPanel& panel, const CodeGrid& grid, float first, float step, int steps, float* scale);
  /// Looks for better codes of scales, in [low, high], up to one away; with each the minimum, in [0, high], that is
  /// best for the codes it gives and those beside it: `rounds` 2 to 4 of them (0: all minimums are 0). Replaces those
  /// of `codes` and their errors.
  void (*improve)(const GroupPanel& panel, const CodeGrid& grid, float low, float high, int rounds, ScaleCodes& codes);
  /// What the codes of the values sum up to.
  void (*sum_up)(const GroupPanel& panel, const CodeGrid& grid, const float* scale, const float* minimum,
                 GroupSums& sums);
  /// Those of `count` groups of `size` values, a multiple of kPanel, that lie one after the other; from 0 for the
  /// grid's lowest.
  void (*codes)(const float* groups, size_t size, size_t count, const CodeGrid& grid, const float* scale,
                const float* minimum, uint8_t* codes);
};

/// That of a level.
const GroupSearch& group_search(const KernelLevel& level = active_kernel_level());

}  // namespace bitwright
