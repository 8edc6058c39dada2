#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "kernels/kernel_level.hpp"
#include "scheme/range.hpp"

namespace bitwright {

/// Groups that are consecutive elements: lines of `line` elements are cut into `groups_a_line` groups of `size`, the
/// last of a line perhaps shorter.
struct GroupRuns {
  int64_t line, size, groups_a_line, groups;

  int64_t start(int64_t g) const { return g / groups_a_line * line + g % groups_a_line * size; }
  /// Where group g ends.
  int64_t end_of(int64_t g) const {
    const int64_t next = g + 1;
    return next % groups_a_line == 0 ? next / groups_a_line * line : start(next);
  }
};
/// use(first group - begin, first element - that of `begin`, elements a group, groups) for stretches of equally long
/// groups among [begin, end).
template <class Use>
void for_each_stretch(const GroupRuns& runs, int64_t begin, int64_t end, Use use) {
  const bool whole_lines = runs.line % runs.size == 0;
  for (int64_t g = begin; g < end;) {
    const int64_t line_end = (g / runs.groups_a_line + 1) * runs.groups_a_line;
    int64_t stop = whole_lines ? end : std::min(end, line_end);
    const bool has_short = !whole_lines && stop == line_end;
    if (has_short && stop - g > 1) --stop;
    const int64_t size = runs.end_of(stop - 1) - runs.start(stop - 1);
    use(static_cast<size_t>(g - begin), static_cast<size_t>(runs.start(g) - runs.start(begin)),
        static_cast<size_t>(size), static_cast<size_t>(stop - g));
    g = stop;
  }
}
/// Nothing for other groupings, and for tensors without elements.
std::optional<GroupRuns> group_runs(const Grouping& grouping, const Shape& shape);

/// How the kernels encode one group; made once a tensor.
struct GroupEncoding {
  const Scheme* scheme;
  float lowest, highest;  ///< integers
  bool has_zero;
  std::optional<DType> scale_dtype;       ///< of plain scales: f16, bf16 or f32
  std::array<float, 15> midpoints{};      ///< of tables with 16 values
  std::array<int32_t, 16> table_words{};  ///< code of each value, the values rising
};

/// Quantizes a weight as the file stores it; f16, bf16 and f32 are never widened as a whole. Bit for bit what the
/// definition gives (encode() of scheme/ with choose_range), on every level and any number of threads.
/// Throws what the definition throws; for damaged weights the position is the first one.
QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight, RangeRule rule,
                       const KernelLevel& level = active_kernel_level());

/// The first number that is NaN or infinite as f32, and its value; nothing: all are finite.
struct NonFinite {
  size_t position;
  float value;
};
std::optional<NonFinite> find_non_finite(WeightView weight, const KernelLevel& level = active_kernel_level());
/// Throws Error{"not-finite"} for the first NaN or infinity. first: position of the first value in its tensor.
void check_finite(WeightView weight, int64_t first = 0, const KernelLevel& level = active_kernel_level());

/// Can groups of this tensor be encoded one by one: consecutive elements, scales that are plain f16, bf16 or f32?
bool encodes_in_pieces(const Scheme& scheme, const Shape& shape, DType stored);

/// Where the groups [begin, end) of a tensor go: one code a byte, then their scales and zero points (null where the
/// scheme has none).
struct EncodedGroups {
  std::byte* codes;
  std::byte* scales;
  std::byte* zeros;
};

/// Encodes groups one after the other, for streaming. Needs encodes_in_pieces. May be shared between threads.
class GroupEncoder {
 public:
  GroupEncoder(const Scheme& scheme, const Shape& shape, RangeRule rule,
               const KernelLevel& level = active_kernel_level());
  GroupEncoder(const GroupEncoder&) = delete;
  GroupEncoder& operator=(const GroupEncoder&) = delete;
  const GroupRuns& runs() const { return runs_; }

  /// weight: the elements of groups [begin, end) alone. Throws as encode().
  void encode(int64_t begin, int64_t end, WeightView weight, const EncodedGroups& out) const;

 private:
  friend class TensorEncoder;
  /// False where a value is NaN or infinite.
  bool ranges(int64_t begin, int64_t end, WeightView weight, std::span<Range> out) const;
  /// scales, zeros: as decoded, room for a multiple of kPanel. Throws Error{"scale-overflow"}.
  void parameters(std::span<const Range> ranges, float* scales, float* zeros) const;
  void codes(int64_t begin, int64_t end, WeightView weight, const float* scales, const float* zeros,
             std::byte* out) const;
  /// Values of groups that have `size` elements each.
  void codes_of(WeightView values, size_t size, size_t groups, bool short_block, const float* scales,
                const float* zeros, std::byte* out) const;
  Scheme scheme_;
  GroupRuns runs_;
  RangeRule rule_;
  const KernelLevel& level_;
  GroupEncoding encoding_;  ///< points to scheme_
  bool has_search_ = false;
};

// Of scalar_kernel_level: the definition, called group by group.
bool find_extremes(DType dtype, const std::byte* values, size_t count, Range& range);
bool search_ranges(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                   float* scratch, Range* ranges);
void group_parameters(const GroupEncoding& e, const Range* ranges, size_t groups, float* scales, float* zeros);
void encode_integers(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                     const float* scales, const float* zeros, std::byte* codes);
void encode_table(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                  const float* scales, std::byte* codes);

}  // namespace bitwright
