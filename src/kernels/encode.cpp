#include "kernels/encode.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/rows.hpp"

namespace bitwright {
namespace {

constexpr int64_t kChunk = int64_t{1} << 16;          ///< elements a task encodes: they stay in the second-level cache
constexpr int64_t kLongestSearch = int64_t{1} << 14;  ///< longer groups are searched by the definition
constexpr int64_t kMostGroups = int64_t{1} << 14;     ///< of one task, so that its parameters stay small

bool is_stored_float(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32; }

std::optional<DType> plain_scale_dtype(const Scheme& scheme) {
  if (!scheme.scale || !scheme.scale->scheme->is_plain()) return std::nullopt;
  const auto dtype = dtype_of(*scheme.scale->scheme->element);
  return dtype && is_stored_float(*dtype) ? dtype : std::nullopt;
}

bool is_table16(const ElementType& type) { return type.kind == ElementKind::table && type.bits == 4; }

/// Has the kernel of this element and offset, whatever its scales are?
bool has_kernel(const Scheme& scheme) {
  if (!scheme.scale || scheme.scale->divides || scheme.factor != 1) return false;
  const bool integer = scheme.element->kind == ElementKind::integer;
  if (scheme.offset_kind == OffsetKind::none) return integer || is_table16(*scheme.element);
  return integer && scheme.offset_kind == OffsetKind::zero_point && scheme.offset->grouping == scheme.scale->grouping &&
         *scheme.offset->scheme == Scheme{.element = scheme.element};
}

GroupEncoding make_encoding(const Scheme& scheme) {
  const ElementType& type = *scheme.element;
  GroupEncoding e = {.scheme = &scheme,
                     .lowest = type.lowest,
                     .highest = type.highest,
                     .has_zero = scheme.offset_kind == OffsetKind::zero_point,
                     .scale_dtype = plain_scale_dtype(scheme)};
  if (is_table16(type)) {
    std::array<float, 16> values = {};
    for (uint32_t code = 0; code < values.size(); ++code) values.at(code) = type.decode(type, code);
    const SortedTable table(values);
    std::ranges::copy(table.midpoints(), e.midpoints.begin());
    std::ranges::copy(table.codes(), e.table_words.begin());
  }
  return e;
}

size_t padded(size_t groups) { return (groups + kPanel - 1) / kPanel * kPanel; }

std::vector<float> widen(WeightView weight) {
  std::vector<float> values(weight.count());
  to_f32(weight.dtype, weight.bytes, values);
  return values;
}

/// Smallest and largest of a group that is too long for one task.
bool long_extremes(const KernelLevel& level, WeightView group, Range& range) {
  const size_t grain = static_cast<size_t>(kChunk), bytes = size_bytes(group.dtype);
  std::vector<Range> parts((group.count() + grain - 1) / grain);
  std::atomic<bool> finite = true;
  parallel_ranges(group.count(), grain, [&](size_t begin, size_t end) {
    if (!level.find_extremes(group.dtype, &group.bytes[begin * bytes], end - begin, parts[begin / grain]))
      finite = false;
  });
  range = parts.front();
  for (const Range& part : parts) range = {std::min(range.low, part.low), std::max(range.high, part.high)};
  return finite;
}

}  // namespace

std::optional<GroupRuns> group_runs(const Grouping& grouping, const Shape& shape) {
  const int64_t count = element_count(shape);
  if (count == 0) return std::nullopt;
  GroupRuns runs = {.line = count, .size = grouping.size, .groups_a_line = 1, .groups = 1};
  switch (grouping.kind) {
    case Grouping::Kind::tensor:
      if (shape.size() > 2) runs.line = shape[shape.size() - 2] * shape.back();
      runs.size = runs.line;
      break;
    case Grouping::Kind::axis:
      if (grouping.axis != -1 || shape.empty()) return std::nullopt;
      runs.line = shape.back();
      if (runs.size == 0) runs.size = runs.line;
      break;
    case Grouping::Kind::flat:
      if (grouping.interleaved) return std::nullopt;
      break;
    default:
      return std::nullopt;
  }
  if (runs.size <= 0) return std::nullopt;
  runs.groups_a_line = (runs.line - 1) / runs.size + 1;
  runs.groups = count / runs.line * runs.groups_a_line;
  return runs;
}

bool encodes_in_pieces(const Scheme& scheme, const Shape& shape, DType stored) {
  return is_stored_float(stored) && has_kernel(scheme) && plain_scale_dtype(scheme) &&
         group_runs(scheme.scale->grouping, shape);
}

std::optional<NonFinite> find_non_finite(WeightView weight, const KernelLevel& level) {
  const auto grain = static_cast<size_t>(kChunk);
  const size_t bytes = size_bytes(weight.dtype), pieces = (weight.count() + grain - 1) / grain;
  std::vector<char> damaged(pieces);
  parallel_ranges(weight.count(), grain, [&](size_t begin, size_t end) {
    const WeightView piece = {weight.dtype, weight.bytes.subspan(begin * bytes, (end - begin) * bytes)};
    Range range = {};
    if (is_stored_float(weight.dtype))
      damaged[begin / grain] = !level.find_extremes(weight.dtype, piece.bytes.data(), piece.count(), range);
    else
      damaged[begin / grain] = !std::ranges::all_of(widen(piece), [](float v) { return std::isfinite(v); });
  });
  const size_t found = static_cast<size_t>(std::ranges::find(damaged, char{1}) - damaged.begin());
  if (found == pieces) return std::nullopt;
  const size_t begin = found * grain, count = std::min(grain, weight.count() - begin);
  const std::vector<float> values = widen({weight.dtype, weight.bytes.subspan(begin * bytes, count * bytes)});
  const auto bad = std::ranges::find_if(values, [](float v) { return !std::isfinite(v); }) - values.begin();
  return NonFinite{.position = begin + static_cast<size_t>(bad), .value = values.at(static_cast<size_t>(bad))};
}

void check_finite(WeightView weight, int64_t first, const KernelLevel& level) {
  if (const auto bad = find_non_finite(weight, level))
    throw_not_finite(first + static_cast<int64_t>(bad->position), bad->value);
}

GroupEncoder::GroupEncoder(const Scheme& scheme, const Shape& shape, RangeRule rule, const KernelLevel& level)
    : scheme_(scheme), runs_(group_runs(scheme.scale->grouping, shape).value()), rule_(rule), level_(level) {
  encoding_ = make_encoding(scheme_);
  // Of scales that are quantized themselves the search knows no rounding.
  has_search_ =
      scheme_.element->kind == ElementKind::integer && (encoding_.scale_dtype || !scheme_.scale->scheme->is_plain());
}

bool GroupEncoder::ranges(int64_t begin, int64_t end, WeightView weight, std::span<Range> out) const {
  const size_t bytes = size_bytes(weight.dtype);
  thread_local std::vector<float> scratch;
  bool finite = true;
  for_each_stretch(runs_, begin, end, [&](size_t g, size_t first, size_t size, size_t groups) {
    const std::byte* const values = &weight.bytes[first * bytes];
    const bool search = rule_ == RangeRule::mse;
    if (search && has_search_ && size <= static_cast<size_t>(kLongestSearch)) {
      scratch.resize(std::max(scratch.size(), size * kPanel));
      finite = level_.search_ranges(encoding_, weight.dtype, values, size, groups, scratch.data(), &out[g]) && finite;
      return;
    }
    for (size_t i = 0; i < groups; ++i) {
      const std::byte* const group = values + i * size * bytes;
      finite = level_.find_extremes(weight.dtype, group, size, out[g + i]) && finite;
      if (search && finite) out[g + i] = least_squares_range(scheme_, widen({weight.dtype, {group, size * bytes}}));
    }
  });
  return finite;
}

void GroupEncoder::parameters(std::span<const Range> ranges, float* scales, float* zeros) const {
  level_.group_parameters(encoding_, ranges.data(), ranges.size(), scales, zeros);
  for (size_t g = 0; g < ranges.size(); ++g)
    if (!std::isfinite(scales[g])) {
      const float ideal = ideal_scale(scheme_, ranges[g]);
      throw_scale_overflow(ideal, std::isfinite(ideal) ? scheme_.scale->scheme->element->name : "float32");
    }
}

void GroupEncoder::codes_of(WeightView values, size_t size, size_t groups, bool short_block, const float* scales,
                            const float* zeros, std::byte* out) const {
  const std::byte* const from = values.bytes.data();
  if (scheme_.element->kind == ElementKind::integer)
    return level_.encode_integers(encoding_, values.dtype, from, size, groups, scales, zeros, out);
  if (!short_block) return level_.encode_table(encoding_, values.dtype, from, size, groups, scales, out);
  const std::vector<float> wide = widen(values);
  for (size_t i = 0; i < wide.size(); ++i)
    out[i] = static_cast<std::byte>(encode_value(scheme_, {.scale = scales[i / size]}, wide[i], true));
}

void GroupEncoder::codes(int64_t begin, int64_t end, WeightView weight, const float* scales, const float* zeros,
                         std::byte* out) const {
  const size_t bytes = size_bytes(weight.dtype);
  const bool flat = scheme_.scale->grouping.kind == Grouping::Kind::flat;
  for_each_stretch(runs_, begin, end, [&](size_t g, size_t first, size_t size, size_t groups) {
    const WeightView values = {weight.dtype, weight.bytes.subspan(first * bytes, size * groups * bytes)};
    codes_of(values, size, groups, flat && static_cast<int64_t>(size) < scheme_.scale->grouping.size, scales + g,
             zeros == nullptr ? nullptr : zeros + g, out + first);
  });
}

void GroupEncoder::encode(int64_t begin, int64_t end, WeightView weight, const EncodedGroups& out) const {
  const auto groups = static_cast<size_t>(end - begin);
  thread_local std::vector<Range> found;
  thread_local std::vector<float> scales, zeros;
  found.resize(padded(groups), {0, 0});
  scales.resize(padded(groups));
  zeros.resize(padded(groups));
  const std::span<Range> these = std::span(found).first(groups);
  if (!ranges(begin, end, weight, these)) check_finite(weight, runs_.start(begin));
  parameters(these, scales.data(), zeros.data());
  const DType dtype = *encoding_.scale_dtype;
  from_f32(dtype, std::span(scales).first(groups), {out.scales, groups * size_bytes(dtype)});
  if (encoding_.has_zero)
    for (size_t g = 0; g < groups; ++g)
      out.zeros[g] = static_cast<std::byte>(scheme_.element->nearest(*scheme_.element, zeros[g]));
  codes(begin, end, weight, scales.data(), encoding_.has_zero ? zeros.data() : nullptr, out.codes);
}

/// One whole tensor.
class TensorEncoder {
 public:
  TensorEncoder(const Scheme& scheme, const Shape& shape, WeightView weight, RangeRule rule, const KernelLevel& level)
      : encoder_(scheme, shape, rule, level), runs_(encoder_.runs_), weight_(weight), level_(level) {
    tensor_.scheme = scheme;
    tensor_.shape = shape;
    tensor_.codes.resize(weight.count());
    const int64_t wanted = std::max<int64_t>(kChunk / runs_.size, 1);
    chunk_ = static_cast<size_t>(std::min(wanted, kMostGroups));
  }

  QuantizedTensor run() {
    if (encoder_.encoding_.scale_dtype && runs_.size <= kLongest)
      encode_at_once();
    else
      encode_in_phases();
    return std::move(tensor_);
  }

 private:
  static constexpr int64_t kLongest = 4 * kChunk;  ///< longer groups are split among threads

  WeightView part(int64_t begin, int64_t end) const { return elements(runs_.start(begin), runs_.end_of(end - 1)); }
  WeightView elements(int64_t begin, int64_t end) const {
    const size_t bytes = size_bytes(weight_.dtype);
    return {weight_.dtype,
            weight_.bytes.subspan(static_cast<size_t>(begin) * bytes, static_cast<size_t>(end - begin) * bytes)};
  }

  template <class Use>
  void for_each_chunk(Use use) const {
    parallel_ranges(static_cast<size_t>(runs_.groups), chunk_,
                    [&](size_t begin, size_t end) { use(static_cast<int64_t>(begin), static_cast<int64_t>(end)); });
  }

  /// Each task finds its ranges, then its codes, while its weights are in the cache.
  void encode_at_once() {
    const Scheme& scheme = tensor_.scheme;
    const auto groups = static_cast<size_t>(runs_.groups);
    const auto parameter_tensor = [&](const Parameter& p) {
      auto t = std::make_shared<QuantizedTensor>();
      t->scheme = *p.scheme;
      t->shape = parameter_shape(p.grouping, tensor_.shape);
      t->codes.resize(groups * p.scheme->element->code_bytes());
      return t;
    };
    const auto scale = parameter_tensor(*scheme.scale);
    const auto zero = scheme.offset ? parameter_tensor(*scheme.offset) : nullptr;
    const size_t scale_bytes = scale->scheme.element->code_bytes();
    std::atomic<bool> damaged = false;
    for_each_chunk([&](int64_t begin, int64_t end) {
      const auto at = static_cast<size_t>(begin);
      try {
        encoder_.encode(begin, end, part(begin, end),
                        {.codes = &tensor_.codes[static_cast<size_t>(runs_.start(begin))],
                         .scales = &scale->codes[at * scale_bytes],
                         .zeros = zero ? &zero->codes[at] : nullptr});
      } catch (const Error& error) {
        if (error.code() != "not-finite") throw;
        damaged = true;  // the position is the first one's, whichever thread was first
      }
    });
    if (damaged) check_finite(weight_);
    tensor_.scale = scale;
    tensor_.offset = zero;
  }

  /// Scales that are quantized themselves, and groups too long for one thread: all ranges first.
  void encode_in_phases() {
    std::vector<Range> ranges(padded(static_cast<size_t>(runs_.groups)), {0, 0});
    if (!find_ranges(ranges)) check_finite(weight_);
    ranges.resize(static_cast<size_t>(runs_.groups));
    const ChosenParameters chosen = encode_parameters(tensor_.scheme, tensor_.shape, ranges);
    tensor_.scale = chosen.scale;
    tensor_.offset = chosen.offset;
    const float* const zero = chosen.zeros.empty() ? nullptr : chosen.zeros.data();
    if (runs_.size > kLongest) return encode_long_groups(chosen.scales.data(), zero);
    for_each_chunk([&](int64_t begin, int64_t end) {
      encoder_.codes(begin, end, part(begin, end), &chosen.scales[static_cast<size_t>(begin)],
                     zero == nullptr ? nullptr : zero + begin, &tensor_.codes[static_cast<size_t>(runs_.start(begin))]);
    });
  }

  bool find_ranges(std::vector<Range>& ranges) const {
    std::atomic<bool> finite = true;
    if (runs_.size <= kLongest) {
      for_each_chunk([&](int64_t begin, int64_t end) {
        const auto count = static_cast<size_t>(end - begin);
        if (!encoder_.ranges(begin, end, part(begin, end),
                             std::span(ranges).subspan(static_cast<size_t>(begin), count)))
          finite = false;
      });
      return finite;
    }
    for (int64_t g = 0; g < runs_.groups && finite; ++g) {
      const WeightView group = part(g, g + 1);
      Range& range = ranges[static_cast<size_t>(g)];
      if (!long_extremes(level_, group, range)) return false;
      if (encoder_.rule_ == RangeRule::mse) range = least_squares_range(tensor_.scheme, widen(group));
    }
    return finite;
  }

  void encode_long_groups(const float* scales, const float* zeros) {
    for (int64_t g = 0; g < runs_.groups; ++g) {
      const int64_t first = runs_.start(g), count = runs_.end_of(g) - first;
      const Grouping& grouping = tensor_.scheme.scale->grouping;
      const bool short_block = grouping.kind == Grouping::Kind::flat && count < grouping.size;
      parallel_ranges(static_cast<size_t>(count), static_cast<size_t>(kChunk), [&](size_t begin, size_t end) {
        const auto from = first + static_cast<int64_t>(begin), to = first + static_cast<int64_t>(end);
        encoder_.codes_of(elements(from, to), end - begin, 1, short_block, scales + g,
                          zeros == nullptr ? nullptr : zeros + g, &tensor_.codes[static_cast<size_t>(from)]);
      });
    }
  }

  QuantizedTensor tensor_;
  GroupEncoder encoder_;
  const GroupRuns& runs_;
  WeightView weight_;
  const KernelLevel& level_;
  size_t chunk_ = 1;
};

QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight, RangeRule rule,
                       const KernelLevel& level) {
  BW_ASSERT(static_cast<int64_t>(weight.count()) == element_count(shape));
  std::vector<float> values;
  if (!is_stored_float(weight.dtype)) {
    values = widen(weight);
    weight = {DType::f32, std::as_bytes(std::span(values))};
  }
  if (has_kernel(scheme) && group_runs(scheme.scale->grouping, shape))
    return TensorEncoder(scheme, shape, weight, rule, level).run();
  if (values.empty()) values = widen(weight);
  return encode(scheme, shape, values,
                [rule](const Scheme& s, std::span<const float> group) { return choose_range(rule, s, group); });
}

}  // namespace bitwright
