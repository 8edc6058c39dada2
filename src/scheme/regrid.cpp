#include "scheme/regrid.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>

#include "base/error.hpp"

namespace bitwright {
namespace {

/// Why there is no tensor; never leaves this file.
struct NoPlace {
  std::string reason;
};
[[noreturn]] void no_place(std::string reason) { throw NoPlace{std::move(reason)}; }

constexpr double kZeroTolerance = 1.0 / 8;  ///< of a zero point that is to be a whole number, in codes

bool is_integer(const ElementType& type) { return type.kind == ElementKind::integer; }
bool is_block(const ElementType& type) { return type.kind == ElementKind::block_code; }

float value_of(const ElementType& type, uint32_t code) { return type.decode(type, code); }

/// The code of exactly this value; of NaN the first NaN. Nothing: it has none.
std::optional<uint32_t> code_of(const ElementType& type, float value) {
  if (std::isfinite(value)) {
    const uint32_t code = type.nearest(type, value);
    return value_of(type, code) == value ? std::optional(code) : std::nullopt;
  }
  for (uint32_t code = 0; code < 1u << type.bits; ++code)
    if (const float v = value_of(type, code); std::isnan(value) ? std::isnan(v) : v == value) return code;
  return std::nullopt;
}

/// By what codes' values are multiplied on the way: 2 where e2m1's halves become whole numbers. 0: they have no common
/// grid.
float ratio(const ElementType& from, const ElementType& to) {
  if (!is_integer(to)) return 1;
  for (const float r : {1.0f, 2.0f}) {
    bool whole = true;
    for (uint32_t code = 0; code < 1u << from.bits; ++code) {
      const float value = r * value_of(from, code);
      whole = whole && value == std::nearbyint(value);
    }
    if (whole) return r;
  }
  return 0;
}

/// Which of `to`'s codes has the value r * e + d, for each code of `from`; kNone: none has.
class CodeMaps {
 public:
  static constexpr int16_t kNone = -1;
  using Map = std::array<int16_t, 256>;

  CodeMaps(const ElementType& from, const ElementType& to) : from_(from), to_(to), ratio_(bitwright::ratio(from, to)) {}

  float ratio() const { return ratio_; }
  const Map& map(float shift) {
    const auto [found, is_new] = maps_.try_emplace(shift);
    if (is_new) {
      found->second.fill(kNone);
      for (uint32_t code = 0; code < 1u << from_.bits; ++code)
        if (const auto to = code_of(to_, ratio_ * value_of(from_, code) + shift))
          found->second.at(code) = static_cast<int16_t>(*to);
    }
    return found->second;
  }

 private:
  const ElementType &from_, &to_;
  float ratio_;
  std::map<float, Map> maps_;
};

/// A plain array of these numbers, each to nearest. Throws NoPlace of what is not finite, and of what an integer type
/// does not hold.
QuantizedTensor stored(std::span<const double> values, const Scheme& scheme, const Shape& shape) {
  const ElementType& type = *scheme.element;
  QuantizedTensor out = {.scheme = scheme, .shape = shape};
  const size_t bytes = type.code_bytes();
  out.codes.resize(values.size() * bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto value = static_cast<float>(values[i]);
    if (!std::isfinite(value)) no_place("a scale or an offset is not finite");
    const uint32_t code = type.nearest(type, value);
    const float back = value_of(type, code);
    if (!std::isfinite(back)) no_place(fmt::format("{} is too large for {}", value, type.name));
    if (is_integer(type) && std::fabs(back - values[i]) > kZeroTolerance)
      no_place(fmt::format("the zero point {:.4g} has no place in {}", values[i], type.name));
    std::memcpy(out.codes.data() + i * bytes, &code, bytes);
  }
  return out;
}

/// A group's values as numbers: (e - zero) * step + add.
struct Affine {
  double step, zero, add;
  /// Where 0 of this group lies, counted in steps from e = 0.
  double origin() const { return zero - (add == 0 ? 0 : add / step); }
};

Affine affine_of(const Scheme& s, const GroupParameters& p) {
  const double scale = p.scale, offset = p.offset, factor = s.factor;
  const double step = s.scale && s.scale->divides ? factor / scale : factor * scale;
  switch (s.offset_kind) {
    case OffsetKind::none:
      return {step, 0, 0};
    case OffsetKind::zero_point:
    case OffsetKind::float_zero:
      return {step, offset, 0};
    case OffsetKind::bias:
      return {step, 0, offset};
    case OffsetKind::minimum:
      return {step, 0, -offset};
    case OffsetKind::shift:
      return {step, s.shift, 0};
  }
  return {};
}

bool stores_offset(OffsetKind kind) { return kind != OffsetKind::none && kind != OffsetKind::shift; }

/// One parameter's groups and numbers.
struct Groups {
  std::optional<GroupMap> map{};
  Groups(const std::optional<Parameter>& p, const QuantizedTensor& t) {
    if (!p) return;
    const bool indexed = p->grouping.kind == Grouping::Kind::index;
    map.emplace(p->grouping, t.shape, indexed ? t.group_index : std::vector<int32_t>{});
  }
  size_t of(int64_t i) const { return map ? static_cast<size_t>(map->group_of(i)) : 0; }
  int64_t run(int64_t i, int64_t most) const { return map ? std::min(most, map->run_length(i)) : most; }
};

/// The numbers of the target's groups, each found several times and to be the same each time.
class Numbers {
 public:
  explicit Numbers(size_t count) : values_(count, std::nan("")) {}
  void set(size_t group, double value, std::string_view what) {
    double& kept = values_[group];
    if (!std::isnan(kept) && kept != value)
      no_place(fmt::format("elements that would share one {} have different ones", what));
    kept = value;
  }
  std::span<const double> values() {
    for (double& value : values_)
      if (std::isnan(value)) value = 0;  // of a group without elements
    return values_;
  }

 private:
  std::vector<double> values_;
};

class Regrid {
 public:
  Regrid(const QuantizedTensor& from, const Scheme& to)
      : from_(from),
        to_(to),
        source_(from),
        maps_(*from.scheme.element, *to.element),
        from_scale_(from.scheme.scale, from),
        from_offset_(from.scheme.offset, from) {
    out_ = {.scheme = to, .shape = from.shape};
    if (to.scale->grouping.kind == Grouping::Kind::index) {
      if (from.group_index.empty()) no_place("it has no index of groups");
      out_.group_index = from.group_index;
    }
    to_scale_.emplace(to.scale, out_);
    to_offset_.emplace(to.offset, out_);
  }

  QuantizedTensor run() {
    move_codes();
    store_parameters();
    check_rounding();
    return std::move(out_);
  }

 private:
  struct Run {
    int64_t begin, count;
    size_t scale, offset;  ///< groups of the source
  };
  /// Runs of elements that share all parameters, on both sides.
  template <class Visit>
  void for_each_run(const Visit& visit) const {
    const int64_t elements = element_count(from_.shape);
    for (int64_t i = 0; i < elements;) {
      int64_t count = elements - i;
      for (const Groups* groups : {&from_scale_, &from_offset_, &*to_scale_, &*to_offset_})
        count = groups->run(i, count);
      visit(Run{i, count, from_scale_.of(i), from_offset_.of(i)});
      i += count;
    }
  }

  GroupParameters parameters_of(const Run& run) const {
    GroupParameters p;
    if (from_.scheme.scale) p.scale = source_.scales()[run.scale];
    if (from_.scheme.offset) p.offset = source_.offsets()[run.offset];
    return p;
  }

  /// d of a group: free to choose where an offset is stored, else what brings 0 to its place.
  float shift_of(const Affine& a) const {
    const double ratio = maps_.ratio();
    if (!stores_offset(to_.offset_kind)) {
      const double fixed = to_.offset_kind == OffsetKind::shift ? to_.shift : 0;
      const double shift = fixed - ratio * a.origin(), whole = std::nearbyint(shift);
      if (!(std::fabs(shift - whole) <= kZeroTolerance)) no_place("0 of a group lies between two codes");
      return static_cast<float>(whole);
    }
    const ElementType &from = *from_.scheme.element, &to = *to_.element;
    const float low = maps_.ratio() * from.lowest, high = maps_.ratio() * from.highest;
    return low >= to.lowest && high <= to.highest ? 0 : to.lowest - low;
  }

  double offset_of(const Affine& a, float shift) const {
    const double ratio = maps_.ratio(), zero = shift + ratio * a.origin();
    switch (to_.offset_kind) {
      case OffsetKind::zero_point:
        return std::fabs(zero - std::nearbyint(zero)) <= kZeroTolerance ? std::nearbyint(zero) : zero;
      case OffsetKind::float_zero:
        return zero;
      case OffsetKind::bias:
        return a.add - (a.zero + shift / ratio) * a.step;
      case OffsetKind::minimum:
        return (a.zero + shift / ratio) * a.step - a.add;
      default:
        return 0;
    }
  }

  void move_codes() {
    out_.codes.resize(from_.codes.size());
    for_each_run([&](const Run& run) {
      const Affine a = affine_of(from_.scheme, parameters_of(run));
      const float shift = shift_of(a);
      const double step = a.step / double{maps_.ratio()};
      const bool divides = to_.scale->divides;
      const size_t group = to_scale_->of(run.begin);
      same_groups_ = same_groups_ && group == run.scale;
      scales_.set(group, divides ? double{to_.factor} / step : step / double{to_.factor}, "scale");
      if (to_.offset) offsets_.set(to_offset_->of(run.begin), offset_of(a, shift), "offset");
      if (shift != last_shift_ || map_ == nullptr) map_ = &maps_.map(last_shift_ = shift);
      move_run(run, *map_);
    });
  }

  void move_run(const Run& run, const CodeMaps::Map& map) {
    const auto begin = static_cast<size_t>(run.begin), count = static_cast<size_t>(run.count);
    const std::byte* const from = from_.codes.data() + begin;
    std::byte* const to = out_.codes.data() + begin;
    const int16_t* const codes = map.data();  // one for each of 256
    int16_t all = 0;
    for (size_t i = 0; i < count; ++i) {
      const int16_t code = codes[std::to_integer<uint8_t>(from[i])];
      all = static_cast<int16_t>(all | code);
      to[i] = static_cast<std::byte>(code);
    }
    if (all >= 0) return;
    const auto lost = std::find_if(from, from + count,
                                   [&](std::byte c) { return codes[std::to_integer<uint8_t>(c)] == CodeMaps::kNone; });
    no_place(fmt::format("the code of {:.4g} has no place in {}",
                         value_of(*from_.scheme.element, std::to_integer<uint8_t>(*lost)), to_.element->name));
  }

  /// scale: where the source's own stands, codes of it can stay what they are.
  QuantizedTensor store(std::span<const double> values, const Parameter& p, const QuantizedTensor* same) const {
    const Shape shape = parameter_shape(p.grouping, from_.shape);
    if (same != nullptr) {
      Regridded kept = regrid(*same, *p.scheme);
      if (kept.tensor) {
        kept.tensor->shape = shape;
        return std::move(*kept.tensor);
      }
    }
    if (!p.scheme->is_plain()) no_place("its scales would have to be quantized");
    return stored(values, *p.scheme, shape);
  }

  void store_parameters() {
    const bool kept = same_groups_ && maps_.ratio() == 1 && to_.factor == from_.scheme.factor && from_.scale &&
                      to_.scale->divides == from_.scheme.scale->divides && !to_.scale->scheme->is_plain() &&
                      !from_.scale->scheme.is_plain();
    out_.scale = std::make_shared<const QuantizedTensor>(
        store(scales_.values(), *to_.scale, kept ? from_.scale.get() : nullptr));
    if (to_.offset)
      out_.offset = std::make_shared<const QuantizedTensor>(store(offsets_.values(), *to_.offset, nullptr));
  }

  /// At the ends of each group's range.
  void check_rounding() const {
    const Decoder target(out_);
    const ElementType& type = *from_.scheme.element;
    const double reach = std::ldexp(double{type.highest} - double{type.lowest}, -type.bits - 1);
    for_each_run([&](const Run& run) {
      const GroupParameters before = parameters_of(run);
      const Affine a = affine_of(from_.scheme, before);
      const float shift = shift_of(a);
      GroupParameters after;
      after.scale = target.scales()[to_scale_->of(run.begin)];
      if (to_.offset) after.offset = target.offsets()[to_offset_->of(run.begin)];
      for (const float e : {type.lowest, type.highest}) {
        const double was = decode_value(from_.scheme, before, e);
        const double is = decode_value(to_, after, maps_.ratio() * e + shift);
        if (!(std::fabs(is - was) <= std::fabs(a.step) * reach))
          no_place(fmt::format("a scale or an offset rounded to {} would move values by more than half a step",
                               to_.scale->scheme->element->name));
      }
    });
  }

  const QuantizedTensor& from_;
  const Scheme& to_;
  const Decoder source_;
  CodeMaps maps_;
  Groups from_scale_, from_offset_;
  std::optional<Groups> to_scale_{}, to_offset_{};
  QuantizedTensor out_{};
  Numbers scales_{parameter_count(to_.scale)}, offsets_{parameter_count(to_.offset)};
  const CodeMaps::Map* map_ = nullptr;
  float last_shift_ = 0;
  bool same_groups_ = true;

  size_t parameter_count(const std::optional<Parameter>& p) const {
    return p ? static_cast<size_t>(element_count(parameter_shape(p->grouping, from_.shape))) : 0;
  }
};

}  // namespace

std::string why_not_regrid(const Scheme& from, const Scheme& to) {
  if (from == to) return {};
  if (is_block(*from.element) || is_block(*to.element)) return "codes of such blocks mean something only together";
  if (from.is_plain() || to.is_plain() || !to.scale || from.element->bits > 8 || to.element->bits > 8)
    return "it is no grid with scales";
  // A table of whole numbers (ggml's iq4) has integers' values; no other has those of a table.
  if (ratio(*from.element, *to.element) == 0 || (to.element->kind == ElementKind::table && from.element != to.element))
    return fmt::format("values of {} are no values of {}", from.element->name, to.element->name);
  return {};
}

Regridded regrid(const QuantizedTensor& from, const Scheme& to) {
  if (from.scheme == to) return {.tensor = from};
  if (std::string reason = why_not_regrid(from.scheme, to); !reason.empty()) return {.reason = std::move(reason)};
  try {
    return {.tensor = Regrid(from, to).run()};
  } catch (const NoPlace& none) {
    return {.reason = none.reason};
  } catch (const Error& error) {  // a grouping that does not apply to the shape
    return {.reason = error.report().why};
  }
}

}  // namespace bitwright
