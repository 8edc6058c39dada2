#include "algorithm/block_search.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "algorithm/codebook_blocks.hpp"
#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/gguf_blocks.hpp"
#include "kernels/encode.hpp"
#include "kernels/group_search.hpp"

namespace bitwright {
namespace {

constexpr size_t kMostGroup = 32;
constexpr size_t kElementsATask = size_t{1} << 15;

/// What the search tries.
struct Effort {
  RangeGrid ranges;
  int solves;      ///< how often the best units follow from the codes
  int units;       ///< further units it starts from
  int rounds = 2;  ///< minimums tried with each scale
};

/// What the search needs to know of a scheme.
struct Plan {
  size_t group, groups;  ///< elements of a group, groups that share a scale's scale (1: scales are plain)
  CodeGrid grid;
  bool affine = false;
  float lowest_scale = 0, highest_scale = 0;  ///< codes of scales, as they are multiplied
  uint8_t scale_mask = 0xff;
  float scale_shift = 0;
  Effort effort{};
  std::array<float, 16> table{};
  std::array<float, 16> midpoints{};
};

/// Found by trying, on numbers of several distributions: without weights the least that loses no more than a thousandth
/// of the error; with them, where ggml tries more, so much that it is not worse than ggml's.
Effort effort_of(const ElementType& element, bool affine, bool weighted) {
  if (element.kind == ElementKind::table) return {{-8, 4, 8}, 1, 0};
  if (!affine && element.bits == 3) return {{-0.9f, 0.3f, 8}, 1, weighted ? 6 : 0};
  if (!affine) return {{-1.0f, 0.4f, 8}, 1, 0};
  if (weighted) return {{-0.9f, 0.15f, 16, 2}, 1, 6, 4};
  if (element.bits == 2) return {{-0.4f, 0.15f, 8}, 1, 0};
  return element.bits == 4 ? Effort{{-0.8f, 0.3f, 8, 2}, 2, 0} : Effort{{-0.9f, 0.2f, 12, 2}, 1, 2, 4};
}

void set_table(const ElementType& element, Plan& plan) {
  for (uint32_t code = 0; code < 16; ++code) plan.table.at(code) = element.decode(element, code);
  plan.midpoints.back() = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i + 1 < 16; ++i) plan.midpoints.at(i) = (plan.table.at(i) + plan.table.at(i + 1)) / 2;
}

/// Not copied afterwards: the grid points into it.
void make_plan(const Scheme& scheme, bool weighted, Plan& plan) {
  const ElementType& element = *scheme.element;
  const Scheme& scale = *scheme.scale->scheme;
  plan.group = static_cast<size_t>(scheme.scale->grouping.size);
  plan.groups = scale.scale ? static_cast<size_t>(scale.scale->grouping.size) : 1;
  plan.affine = scheme.offset_kind == OffsetKind::minimum;
  plan.effort = effort_of(element, plan.affine, weighted);
  plan.grid = {element.lowest - scheme.shift, element.highest - scheme.shift};
  if (element.kind == ElementKind::table) {
    set_table(element, plan);
    plan.grid = {element.lowest, element.highest, plan.table.data(), plan.midpoints.data()};
  }
  if (!scale.scale) return;
  plan.scale_shift = scale.shift;
  plan.lowest_scale = scale.element->lowest - scale.shift;
  plan.highest_scale = scale.element->highest - scale.shift;
  plan.scale_mask = static_cast<uint8_t>((1u << scale.element->bits) - 1);
}

/// As f16 holds it; the largest where it does not.
float to_half(float value) { return f16_to_f32(f32_to_f16(std::clamp(value, -65504.0f, 65504.0f))); }
void put_half(float value, uint8_t* to) {
  const uint16_t half = f32_to_f16(value);
  std::memcpy(to, &half, sizeof half);
}

using LaneValues = std::array<float, kPanel>;

/// kPanel groups that lie one after the other.
class PanelSearch {
 public:
  PanelSearch(const Plan& plan, const GroupSearch& loops) : plan_(plan), loops_(loops) {}

  /// values: kPanel groups, [kPanel][group]; weights: likewise, or null; groups: those that there are, the others are
  /// 0.
  void run(const float* values, const float* weights, size_t groups) {
    used_ = groups;
    loops_.gather(values, plan_.group, values_.data());
    weighted_ = weights != nullptr;
    if (weighted_) loops_.gather(weights, plan_.group, weights_.data());
    if (plan_.affine) {
      search_affine();
    } else {
      search_symmetric();
    }
  }

  /// values: those of run.
  void store(const float* values, const TensorBlocks& parts, size_t first_block) const {
    loops_.codes(values, plan_.group, used_, plan_.grid, scale_.data(), minimum_.data(), parts.of(first_block).codes);
    for (size_t g = 0; g < used_; ++g) {
      const BlockParts to = parts.of(first_block + g / plan_.groups);
      const size_t at = g % plan_.groups;
      if (to.scale_scale == nullptr) {
        put_half(scale_[g], to.scale);
        continue;
      }
      to.scale[at] = static_cast<uint8_t>(static_cast<int>(found_.scale[g] + plan_.scale_shift)) & plan_.scale_mask;
      if (at == 0) put_half(found_.scale_unit[g], to.scale_scale);
      if (to.offset == nullptr) continue;
      to.offset[at] = static_cast<uint8_t>(found_.minimum[g]);
      if (at == 0) put_half(found_.minimum_unit[g], to.offset_scale);
    }
  }

 private:
  GroupPanel panel() const { return {values_.data(), weighted_ ? weights_.data() : nullptr, plan_.group}; }

  /// units[g] = what the codes of the block of group g are multiplied by, so that its largest value has the code `top`.
  void choose_units(const LaneValues& values, float top, float (&units)[kPanel]) const {
    for (size_t first = 0; first < kPanel; first += plan_.groups) {
      float low = 0, high = 0;
      for (size_t g = first; g < first + plan_.groups; ++g) {
        low = std::min(low, values[g]);
        high = std::max(high, values[g]);
      }
      std::fill_n(units + first, plan_.groups, to_half((high < -low ? low : high) / top));
    }
  }

  /// codes[g] = values[g] / units[g] to the nearest of [low, high].
  static void to_codes(const LaneValues& values, const float (&units)[kPanel], float low, float high,
                       float (&codes)[kPanel]) {
    constexpr float kRounder = 12582912;  // 1.5 * 2^23: adding it rounds
    for (size_t g = 0; g < kPanel; ++g) {
      const float unit = units[g], code = values[g] / (unit == 0 ? 1 : unit);
      const float whole = std::min(std::max(code, low), high) + kRounder - kRounder;
      codes[g] = unit == 0 ? 0 : whole;
    }
  }

  void search_affine() {
    LaneValues scales{}, minimums{};
    loops_.fit_affine(panel(), plan_.grid.high, plan_.effort.ranges, scales.data(), minimums.data());
    choose_units(scales, plan_.highest_scale, found_.scale_unit);
    choose_units(minimums, plan_.highest_scale, found_.minimum_unit);
    to_codes(scales, found_.scale_unit, plan_.lowest_scale, plan_.highest_scale, found_.scale);
    to_codes(minimums, found_.minimum_unit, 0, plan_.highest_scale, found_.minimum);
    improve();
  }

  void search_symmetric() {
    LaneValues scales{};
    const RangeGrid& ranges = plan_.effort.ranges;
    loops_.fit_scale(panel(), plan_.grid, ranges.first, ranges.step, ranges.steps, scales.data());
    if (plan_.groups == 1) {
      std::ranges::transform(scales, scale_.begin(), to_half);
      return;
    }
    choose_units(scales, plan_.lowest_scale, found_.scale_unit);
    to_codes(scales, found_.scale_unit, plan_.lowest_scale, plan_.highest_scale, found_.scale);
    improve();
  }

  void improve() {
    try_around();
    ScaleCodes start, best;
    copy(found_, 0, kPanel, start);
    copy(found_, 0, kPanel, best);
    for (int unit = 0; unit <= plan_.effort.units; ++unit) {
      if (unit > 0) {
        start_with_unit(start, unit);
        try_around();
        keep_better(best);
      }
      for (int i = 0; i < plan_.effort.solves; ++i) {
        GroupSums sums;
        loops_.sum_up(panel(), plan_.grid, scale_.data(), minimum_.data(), sums);
        for (size_t first = 0; first < kPanel; first += plan_.groups) solve_units(sums, first);
        try_around();
        keep_better(best);
      }
    }
  }

  /// Codes of scales and minimums beside those found.
  void try_around() {
    const int rounds = plan_.affine ? plan_.effort.rounds : 0;
    loops_.improve(panel(), plan_.grid, plan_.lowest_scale, plan_.highest_scale, rounds, found_);
    set_values();
  }

  /// The better of found_ and `best`, block by block, becomes both.
  void keep_better(ScaleCodes& best) {
    for (size_t first = 0; first < kPanel; first += plan_.groups) {
      const size_t end = first + plan_.groups;
      if (error_of(found_, first) < error_of(best, first)) {
        copy(found_, first, end, best);
      } else {
        copy(best, first, end, found_);
      }
    }
    set_values();
  }

  /// The unit of `start` and 1, -1, 2, -2 … hundredths of it, with the codes that come nearest to the scales.
  void start_with_unit(const ScaleCodes& start, int unit) {
    constexpr float kStep = 0.01f;
    const int hundredths = unit % 2 == 1 ? (unit + 1) / 2 : -(unit / 2);
    const float factor = 1 + kStep * static_cast<float>(hundredths);
    copy(start, 0, kPanel, found_);
    LaneValues scales{};
    for (size_t g = 0; g < kPanel; ++g) {
      scales[g] = start.scale[g] * start.scale_unit[g];
      found_.scale_unit[g] = to_half(start.scale_unit[g] * factor);
    }
    to_codes(scales, found_.scale_unit, plan_.lowest_scale, plan_.highest_scale, found_.scale);
  }

  float error_of(const ScaleCodes& codes, size_t first) const {
    return std::accumulate(codes.error + first, codes.error + first + plan_.groups, 0.0f);
  }

  static void copy(const ScaleCodes& from, size_t first, size_t end, ScaleCodes& to) {
    for (size_t g = first; g < end; ++g) {
      to.scale[g] = from.scale[g];
      to.minimum[g] = from.minimum[g];
      to.scale_unit[g] = from.scale_unit[g];
      to.minimum_unit[g] = from.minimum_unit[g];
      to.error[g] = from.error[g];
    }
  }

  /// Least squares of d and m in d s e - m n, over the groups of a block: s, n the codes of scale and minimum.
  void solve_units(const GroupSums& sums, size_t first) {
    double ss = 0, sn = 0, nn = 0, sx = 0, nx = 0;
    for (size_t g = first; g < first + plan_.groups; ++g) {
      const double s = found_.scale[g], n = found_.minimum[g];
      ss += s * s * static_cast<double>(sums.ee[g]);
      sn -= s * n * static_cast<double>(sums.e[g]);
      nn += n * n * static_cast<double>(sums.w[g]);
      sx += s * static_cast<double>(sums.xe[g]);
      nx -= n * static_cast<double>(sums.x[g]);
    }
    const double determinant = ss * nn - sn * sn;
    double d = ss > 0 ? sx / ss : 0, m = 0;
    if (plan_.affine && nn > 0) {
      if (!(determinant > 1e-6 * ss * nn)) return;
      d = (sx * nn - nx * sn) / determinant;
      m = (nx * ss - sx * sn) / determinant;
    }
    if (d == 0 || (plan_.affine && (d < 0 || m < 0))) return;
    std::fill_n(found_.scale_unit + first, plan_.groups, to_half(static_cast<float>(d)));
    if (plan_.affine) std::fill_n(found_.minimum_unit + first, plan_.groups, to_half(static_cast<float>(m)));
  }

  void set_values() {
    for (size_t g = 0; g < kPanel; ++g) {
      scale_[g] = found_.scale[g] * found_.scale_unit[g];
      minimum_[g] = found_.minimum[g] * found_.minimum_unit[g];
    }
  }

  const Plan& plan_;
  const GroupSearch& loops_;
  size_t used_ = 0;
  bool weighted_ = false;
  std::array<float, kMostGroup * kPanel> values_{}, weights_{};
  ScaleCodes found_{};
  LaneValues scale_{}, minimum_{};
};

}  // namespace

bool is_block_scheme(const Scheme& scheme) {
  if (!scheme.scale || scheme.scale->grouping.kind != Grouping::Kind::axis) return false;
  if (is_codebook_scheme(scheme)) return true;
  const Scheme& scale = *scheme.scale->scheme;
  if (scheme.element == find_element("iq4")) return true;
  return scheme.element->kind == ElementKind::integer && scale.scale && scale.element->kind == ElementKind::integer &&
         find_block_codec(scheme) != nullptr;
}

QuantizedTensor search_blocks(const Scheme& scheme, const Shape& shape, WeightView weight,
                              std::span<const float> importance, const KernelLevel& level) {
  BW_ASSERT(is_block_scheme(scheme));
  if (is_codebook_scheme(scheme)) return search_codebooks(scheme, shape, weight, importance, level);
  check_finite(weight);
  Plan plan;
  make_plan(scheme, !importance.empty(), plan);
  const GroupSearch& loops = group_search(level);
  QuantizedTensor t = block_tensor(scheme, shape);
  const size_t groups = t.codes.size() / plan.group, bytes = size_bytes(weight.dtype);
  const TensorBlocks parts(t, groups / plan.groups);
  const size_t columns = shape.empty() ? 0 : static_cast<size_t>(shape.back());
  const size_t panels = (groups + kPanel - 1) / kPanel, a_panel = kPanel * plan.group;
  parallel_ranges(panels, kElementsATask / a_panel, [&](size_t begin, size_t end) {
    PanelSearch search(plan, loops);
    std::array<float, kMostGroup * kPanel> wide{}, weights{};
    for (size_t p = begin; p < end; ++p) {
      const size_t used = std::min(kPanel, groups - p * kPanel), first = p * a_panel;
      std::fill(wide.begin() + static_cast<std::ptrdiff_t>(used * plan.group), wide.end(), 0.0f);
      to_f32(weight.dtype, weight.bytes.subspan(first * bytes, used * plan.group * bytes),
             std::span(wide).first(used * plan.group));
      for (size_t g = 0; g < kPanel && !importance.empty(); ++g)  // a group lies within a row
        std::copy_n(&importance[(first + g * plan.group) % columns], plan.group, &weights[g * plan.group]);
      search.run(wide.data(), importance.empty() ? nullptr : weights.data(), used);
      search.store(wide.data(), parts, p * kPanel / plan.groups);
    }
  });
  return t;
}

}  // namespace bitwright
