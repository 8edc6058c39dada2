#include "kernels/requantize.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "base/vectorized.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

constexpr int64_t kTask = int64_t{1} << 14;  ///< elements a thread works on at a time
constexpr float kHeadroom = 1.0f / 16;       ///< of the range, more than it needs now
constexpr size_t kLanes = 16;

/// One group, its weights counted in steps of its scale.
struct Grid {
  float scale, zero;  ///< the scale is 1 where the stored one has no reciprocal, whose group is all zeros
  bool is_empty;
};

struct Codes {
  std::byte* bytes;
  int bits;
  bool is_signed;
};

[[gnu::always_inline]] inline float element_of(std::byte code, int unused, bool is_signed) {
  const uint32_t high = static_cast<uint32_t>(code) << unused;
  return is_signed ? static_cast<float>(static_cast<int32_t>(high) >> unused) : static_cast<float>(high >> unused);
}

/// change[i] = where weight i would lie, in steps: an integer by stochastic rounding, the exact place otherwise (an
/// empty group: always exact). random: null for exact places.
template <bool is_signed>
[[gnu::always_inline]] inline void places_of(const Codes& codes, const Grid& grid, float decay, const int8_t* residual,
                                             const uint32_t* random, float* change, size_t count) {
  const int unused = 32 - codes.bits;
  const float reciprocal = 1 / grid.scale;
  for (size_t i = 0; i < count; ++i) {
    const float kept = residual == nullptr ? 0 : static_cast<float>(residual[i]) * (1 / kResidualSteps);
    const float element = element_of(codes.bytes[i], unused, is_signed);
    const float moved = kept + change[i] * reciprocal - decay * (element - grid.zero + kept);
    change[i] = element + (random == nullptr ? moved : std::floor(moved + unit_interval(random[i])));
  }
}

BITWRIGHT_VECTORIZED
void signed_places(const Codes& codes, const Grid& grid, float decay, const int8_t* residual, const uint32_t* random,
                   float* change, size_t count) {
  places_of<true>(codes, grid, decay, residual, random, change, count);
}
BITWRIGHT_VECTORIZED
void unsigned_places(const Codes& codes, const Grid& grid, float decay, const int8_t* residual, const uint32_t* random,
                     float* change, size_t count) {
  places_of<false>(codes, grid, decay, residual, random, change, count);
}

BITWRIGHT_VECTORIZED
Range range_of(std::span<const float> values) {
  float low[kLanes], high[kLanes];
  std::fill_n(low, kLanes, values[0]);
  std::fill_n(high, kLanes, values[0]);
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) {
      low[lane] = values[i + lane] < low[lane] ? values[i + lane] : low[lane];
      high[lane] = values[i + lane] > high[lane] ? values[i + lane] : high[lane];
    }
  Range range = {*std::min_element(low, low + kLanes), *std::max_element(high, high + kLanes)};
  for (; i < values.size(); ++i) range = {std::min(range.low, values[i]), std::max(range.high, values[i])};
  return range;
}

/// Places on another grid; random: as above.
BITWRIGHT_VECTORIZED
void move_places(const Grid& from, const Grid& to, const uint32_t* random, std::span<float> places) {
  const float ratio = from.scale / to.scale;
  for (size_t i = 0; i < places.size(); ++i) {
    const float place = (places[i] - from.zero) * ratio + to.zero;
    places[i] = random == nullptr ? place : std::floor(place + unit_interval(random[i]));
  }
}

BITWRIGHT_VECTORIZED
void store_codes(std::span<const float> places, float lowest, float highest, uint32_t mask, std::byte* codes) {
  for (size_t i = 0; i < places.size(); ++i) {
    const float code = std::min(std::max(places[i], lowest), highest);
    codes[i] = static_cast<std::byte>(static_cast<uint32_t>(static_cast<int32_t>(code)) & mask);
  }
}

/// places[i] = the code nearest to it; residual[i] = what is left, rounded at random so that it is right on average.
BITWRIGHT_VECTORIZED
void split_places(float lowest, float highest, const uint32_t* random, std::span<float> places, int8_t* residual) {
  for (size_t i = 0; i < places.size(); ++i) {
    const float code = std::min(std::max(std::nearbyint(places[i]), lowest), highest);
    const float left = std::floor((places[i] - code) * kResidualSteps + unit_interval(random[i]));
    residual[i] = static_cast<int8_t>(static_cast<int32_t>(std::min(std::max(left, -127.0f), 127.0f)));
    places[i] = code;
  }
}

/// One number of a parameter array: a plain float, or an integer of at most 8 bits.
float parameter_at(const QuantizedTensor& parameter, size_t g) {
  const ElementType& type = *parameter.scheme.element;
  const size_t bytes = type.code_bytes();
  uint32_t code = 0;
  std::memcpy(&code, &parameter.codes[g * bytes], bytes);
  return type.decode(type, code);
}
/// Stores the number nearest to `value` and returns it.
float set_parameter(QuantizedTensor& parameter, size_t g, float value) {
  const ElementType& type = *parameter.scheme.element;
  const size_t bytes = type.code_bytes();
  const uint32_t code = type.nearest(type, value);
  std::memcpy(&parameter.codes[g * bytes], &code, bytes);
  return type.decode(type, code);
}

class Requantizer {
 public:
  Requantizer(const Requantize& how, std::span<float> change, std::span<int8_t> residual, QuantizedTensor& weight)
      : how_(how),
        change_(change),
        residual_(residual),
        weight_(weight),
        type_(*weight.scheme.element),
        runs_(group_runs(weight.scheme.scale->grouping, weight.shape).value()),
        scales_(*weight.scale) {
    if (weight.offset != nullptr) zeros_ = *weight.offset;
  }

  void run() {
    const auto groups = static_cast<size_t>(runs_.groups);
    if (runs_.size > kTask)
      for (size_t g = 0; g < groups; ++g) update_long_group(g);
    else
      parallel_ranges(groups, static_cast<size_t>(std::max<int64_t>(kTask / runs_.size, 1)),
                      [this](size_t begin, size_t end) { update_groups(begin, end); });
    weight_.scale = std::make_shared<const QuantizedTensor>(std::move(scales_));
    if (weight_.offset != nullptr) weight_.offset = std::make_shared<const QuantizedTensor>(std::move(zeros_));
  }

 private:
  bool compensates() const { return how_.rounding == Rounding::error_compensated; }

  Grid grid(size_t g) const {
    const float scale = parameter_at(scales_, g), zero = zeros_.codes.empty() ? 0 : parameter_at(zeros_, g);
    const bool has_reciprocal = std::fabs(scale) >= std::numeric_limits<float>::min();
    return {.scale = has_reciprocal ? scale : 1, .zero = zero, .is_empty = !has_reciprocal};
  }

  /// Of the elements [begin, end) of a group. numbers: those of how_.first for them.
  Range propose(const Grid& grid, size_t begin, size_t end, const uint32_t* numbers) {
    const std::span<float> places = change_.subspan(begin, end - begin);
    if (grid.is_empty) {
      for (float& place : places) place += grid.zero;
      return range_of(places);
    }
    const Codes codes = {.bytes = &weight_.codes[begin], .bits = type_.bits, .is_signed = type_.lowest < 0};
    (codes.is_signed ? signed_places : unsigned_places)(
        codes, grid, how_.decay, compensates() ? &residual_[begin] : nullptr, compensates() ? nullptr : numbers,
        places.data(), places.size());
    return range_of(places);
  }

  /// The grid on which places of this range are stored, by the rule of the header. Written to scales_ and zeros_.
  Grid decide(size_t g, const Grid& old, Range places) {
    const Range codes = {std::nearbyint(places.low), std::nearbyint(places.high)};
    const Range steps = {places.low - old.zero, places.high - old.zero};
    const float extent = weight_.offset == nullptr ? std::max(std::fabs(steps.low), std::fabs(steps.high))
                                                   : std::max(steps.high, 0.0f) - std::min(steps.low, 0.0f);
    const float room = weight_.offset == nullptr ? type_.full_scale : type_.highest - type_.lowest;
    const bool saturated = codes.low < type_.lowest || codes.high > type_.highest;
    if (extent == 0 || (!old.is_empty && !saturated && 2 * extent >= room)) return old;
    const Range wanted = {(steps.low - kHeadroom * extent) * old.scale, (steps.high + kHeadroom * extent) * old.scale};
    const float scale = round_scale(ideal_scale(weight_.scheme, wanted));
    if (!(scale >= std::numeric_limits<float>::min()) || std::isinf(scale)) return old;  // its type has none that fits
    set_parameter(scales_, g, scale);
    Grid changed = {.scale = scale, .zero = 0, .is_empty = false};
    if (weight_.offset != nullptr) changed.zero = set_parameter(zeros_, g, zero_point(weight_.scheme, scale, wanted));
    return changed;
  }
  float round_scale(float scale) const {
    const ElementType& type = *scales_.scheme.element;
    return type.decode(type, type.nearest(type, scale));
  }

  /// Codes and residuals of places that were proposed on `old`.
  void commit(const Grid& old, const Grid& grid, size_t begin, size_t end, const uint32_t* numbers) {
    const std::span<float> places = change_.subspan(begin, end - begin);
    const bool moved = old.scale != grid.scale || old.zero != grid.zero || old.is_empty != grid.is_empty;
    if (!moved && grid.is_empty) return;  // all changes were 0, or too small for a scale
    if (moved) {
      std::vector<uint32_t> others(compensates() ? 0 : places.size());
      random_numbers(how_.second, begin, others);
      move_places(old, grid, compensates() ? nullptr : others.data(), places);
    }
    if (compensates()) split_places(type_.lowest, type_.highest, numbers, places, &residual_[begin]);
    store_codes(places, type_.lowest, type_.highest, (1u << type_.bits) - 1, &weight_.codes[begin]);
  }

  void update_groups(size_t first, size_t last) {
    const auto begin = static_cast<size_t>(runs_.start(static_cast<int64_t>(first)));
    const auto end = static_cast<size_t>(runs_.end_of(static_cast<int64_t>(last) - 1));
    std::vector<uint32_t> numbers(end - begin);
    random_numbers(how_.first, begin, numbers);
    for (size_t g = first; g < last; ++g) {
      const auto from = static_cast<size_t>(runs_.start(static_cast<int64_t>(g)));
      const auto to = static_cast<size_t>(runs_.end_of(static_cast<int64_t>(g)));
      const Grid old = grid(g);
      const Range places = propose(old, from, to, &numbers[from - begin]);
      commit(old, decide(g, old, places), from, to, &numbers[from - begin]);
    }
  }

  /// Its pieces in parallel. The numbers are made twice rather than kept.
  void update_long_group(size_t g) {
    const auto begin = static_cast<size_t>(runs_.start(static_cast<int64_t>(g)));
    const auto count = static_cast<size_t>(runs_.end_of(static_cast<int64_t>(g))) - begin;
    const auto grain = static_cast<size_t>(kTask);
    const Grid old = grid(g);
    std::vector<Range> ranges((count + grain - 1) / grain);
    const auto for_each_piece = [&](const auto& use) {
      parallel_ranges(count, grain, [&](size_t from, size_t to) {
        std::vector<uint32_t> numbers(to - from);
        random_numbers(how_.first, begin + from, numbers);
        use(from / grain, begin + from, begin + to, numbers.data());
      });
    };
    for_each_piece([&](size_t piece, size_t from, size_t to, const uint32_t* numbers) {
      ranges[piece] = propose(old, from, to, numbers);
    });
    Range all = ranges.front();
    for (const Range& range : ranges) all = {std::min(all.low, range.low), std::max(all.high, range.high)};
    const Grid changed = decide(g, old, all);
    for_each_piece(
        [&](size_t, size_t from, size_t to, const uint32_t* numbers) { commit(old, changed, from, to, numbers); });
  }

  const Requantize& how_;
  std::span<float> change_;  ///< becomes places
  std::span<int8_t> residual_;
  QuantizedTensor& weight_;
  const ElementType& type_;
  GroupRuns runs_;
  QuantizedTensor scales_, zeros_{};
};

bool is_plain_float(const Scheme& scheme) {
  const auto dtype = dtype_of(*scheme.element);
  return scheme.is_plain() && (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16);
}

}  // namespace

bool can_requantize(const Scheme& scheme, const Shape& shape) {
  if (scheme.element->kind != ElementKind::integer || scheme.element->bits < 2 || scheme.element->bits > 8)
    return false;
  if (!scheme.scale || scheme.scale->divides || scheme.factor != 1 || !is_plain_float(*scheme.scale->scheme))
    return false;
  if (!group_runs(scheme.scale->grouping, shape)) return false;
  if (scheme.offset_kind == OffsetKind::none) return scheme.element->lowest < 0;
  return scheme.offset_kind == OffsetKind::zero_point && scheme.offset->grouping == scheme.scale->grouping &&
         *scheme.offset->scheme == Scheme{.element = scheme.element};
}

void add_to_quantized(const Requantize& how, std::span<float> change, std::span<int8_t> residual,
                      QuantizedTensor& weight) {
  BW_ASSERT(can_requantize(weight.scheme, weight.shape) && change.size() == weight.codes.size());
  BW_ASSERT(residual.size() == (how.rounding == Rounding::error_compensated ? change.size() : 0));
  Requantizer(how, change, residual, weight).run();
}

}  // namespace bitwright
