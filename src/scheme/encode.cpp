#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr size_t kGroupGrain = 64;

[[noreturn]] void no_encoder(const Scheme& scheme, const std::string& why) {
  throw Error({.code = "bad-scheme", .what = "cannot encode " + describe(scheme), .why = why});
}

void check_encodable(const Scheme& scheme) {
  if (scheme.element->kind == ElementKind::block_code) no_encoder(scheme, "block codes have encoders of their own");
  if (!scheme.scale || scheme.scale->divides || scheme.factor != 1)
    no_encoder(scheme, "only scales that multiply have a reference encoder");
  if (scheme.scale->grouping.kind == Grouping::Kind::index) no_encoder(scheme, "indexed groups come from GPTQ");
  const bool zero_point = scheme.offset_kind == OffsetKind::zero_point;
  if (!zero_point && scheme.offset_kind != OffsetKind::none) no_encoder(scheme, "this kind of offset has none");
  if (zero_point && scheme.offset->grouping != scheme.scale->grouping)
    no_encoder(scheme, "scales and zero points have different groups");
}

void store_code(std::vector<std::byte>& codes, int64_t i, size_t code_bytes, uint32_t code) {
  std::memcpy(codes.data() + static_cast<size_t>(i) * code_bytes, &code, code_bytes);
}

/// Plain numbers: each rounded to the element by itself.
QuantizedTensor encode_plain(const Scheme& scheme, const Shape& shape, std::span<const float> values) {
  QuantizedTensor t = {.scheme = scheme, .shape = shape};
  const ElementType& type = *scheme.element;
  t.codes.resize(values.size() * type.code_bytes());
  const auto dtype = dtype_of(type);
  if (dtype && type.kind == ElementKind::floating) {
    from_f32(*dtype, values, t.codes);
  } else {
    for (size_t i = 0; i < values.size(); ++i)
      store_code(t.codes, static_cast<int64_t>(i), type.code_bytes(), type.nearest(type, values[i]));
  }
  return t;
}

/// What nested scales of bitsandbytes are: the mean is taken off (and stored as a plain bias), the rest is quantized.
QuantizedTensor encode_around_mean(const Scheme& scheme, const Shape& shape, std::span<const float> values) {
  if (!parameter_shape(scheme.offset->grouping, shape).empty()) no_encoder(scheme, "a bias per group has none");
  double sum = 0;
  for (const float value : values) sum += static_cast<double>(value);
  const float ideal = static_cast<float>(values.empty() ? 0 : sum / static_cast<double>(values.size()));
  auto mean = std::make_shared<QuantizedTensor>(encode(*scheme.offset->scheme, {}, std::span(&ideal, 1)));
  const float stored = decode(*mean).at(0);
  std::vector<float> centred(values.begin(), values.end());
  for (float& value : centred) value -= stored;
  Scheme symmetric = scheme;
  symmetric.offset_kind = OffsetKind::none;
  symmetric.offset.reset();
  QuantizedTensor t = encode(symmetric, shape, centred);
  t.scheme = scheme;
  t.offset = std::move(mean);
  return t;
}

/// Bitsandbytes multiplies by the reciprocal in full blocks and divides in a short last one; its codes follow.
float normalise(const Scheme& scheme, float scale, float value, bool short_block) {
  if (scheme.element->kind != ElementKind::table || short_block) return value / scale;
  return std::clamp(value * (1.0f / std::max(scale, 1e-38f)), -1.0f, 1.0f);
}

class Encoder {
 public:
  Encoder(const Scheme& scheme, const Shape& shape, std::span<const float> values, const ChooseRange& choose)
      : scheme_(scheme), shape_(shape), values_(values), choose_(choose), groups_(scheme.scale->grouping, shape) {}

  QuantizedTensor run() {
    ranges_.resize(static_cast<size_t>(groups_.group_count()));
    for_all_groups([this](int64_t g) { choose_range(g); });
    QuantizedTensor t = {.scheme = scheme_, .shape = shape_};
    parameters_ = encode_parameters(scheme_, shape_, ranges_);
    t.scale = parameters_.scale;
    t.offset = parameters_.offset;
    t.codes.resize(values_.size() * scheme_.element->code_bytes());
    for_all_groups([&](int64_t g) { encode_group(g, t.codes); });
    return t;
  }

 private:
  void for_all_groups(const std::function<void(int64_t)>& body) const {
    parallel_ranges(static_cast<size_t>(groups_.group_count()), kGroupGrain, [&](size_t begin, size_t end) {
      for (size_t g = begin; g < end; ++g) body(static_cast<int64_t>(g));
    });
  }

  void choose_range(int64_t g) {
    thread_local std::vector<float> group;
    group.clear();
    groups_.for_each_run(g, [&](GroupMap::Run run) {
      for (int64_t j = 0, i = run.start; j < run.count; ++j, i += run.stride) {
        const float value = values_[static_cast<size_t>(i)];
        if (!std::isfinite(value)) throw_not_finite(i, value);
        group.push_back(value);
      }
    });
    ranges_[static_cast<size_t>(g)] = group.empty() ? Range{0, 0} : choose_(scheme_, group);
  }

  void encode_group(int64_t g, std::vector<std::byte>& codes) const {
    const auto at = static_cast<size_t>(g);
    const GroupParameters p = {.scale = parameters_.scales[at],
                               .offset = parameters_.zeros.empty() ? 0 : parameters_.zeros[at]};
    groups_.for_each_run(g, [&](GroupMap::Run run) {
      const bool short_block =
          scheme_.scale->grouping.kind == Grouping::Kind::flat && run.count < scheme_.scale->grouping.size;
      for (int64_t j = 0, i = run.start; j < run.count; ++j, i += run.stride)
        store_code(codes, i, scheme_.element->code_bytes(),
                   encode_value(scheme_, p, values_[static_cast<size_t>(i)], short_block));
    });
  }

  const Scheme& scheme_;
  const Shape& shape_;
  std::span<const float> values_;
  const ChooseRange& choose_;
  GroupMap groups_;
  std::vector<Range> ranges_;  ///< one a group
  ChosenParameters parameters_;
};

}  // namespace

Range min_max_range(const Scheme&, std::span<const float> values) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return {*low + 0.0f, *high + 0.0f};  // of zeros the positive one, whichever came first
}

float ideal_scale(const Scheme& scheme, Range range) {
  const ElementType& type = *scheme.element;
  if (scheme.offset_kind == OffsetKind::none)
    return std::max(std::fabs(range.low), std::fabs(range.high)) / type.full_scale;
  return (std::max(range.high, 0.0f) - std::min(range.low, 0.0f)) / (type.highest - type.lowest);
}

float zero_point(const Scheme& scheme, float scale, Range range) {
  const ElementType& type = *scheme.element;
  if (scale == 0) return std::max(type.lowest, 0.0f);
  return std::clamp(std::nearbyint(type.lowest - std::min(range.low, 0.0f) / scale), type.lowest, type.highest);
}

ChosenParameters encode_parameters(const Scheme& scheme, const Shape& shape, std::span<const Range> ranges) {
  const Scheme& stored = *scheme.scale->scheme;
  ChosenParameters chosen;
  for (const Range& range : ranges) {
    chosen.scales.push_back(ideal_scale(scheme, range));
    if (!std::isfinite(chosen.scales.back())) throw_scale_overflow(chosen.scales.back(), "float32");
  }
  chosen.scale =
      std::make_shared<QuantizedTensor>(encode(stored, parameter_shape(scheme.scale->grouping, shape), chosen.scales));
  std::vector<float> decoded = decode(*chosen.scale);
  for (size_t g = 0; g < decoded.size(); ++g)
    if (!std::isfinite(decoded[g])) throw_scale_overflow(chosen.scales[g], stored.element->name);
  // Codes of table types are chosen before their scales are quantized again, as bitsandbytes does.
  if (stored.is_plain() || scheme.element->kind != ElementKind::table) chosen.scales = std::move(decoded);
  if (scheme.offset_kind != OffsetKind::zero_point) return chosen;
  for (size_t g = 0; g < ranges.size(); ++g) chosen.zeros.push_back(zero_point(scheme, chosen.scales[g], ranges[g]));
  chosen.offset = std::make_shared<QuantizedTensor>(
      encode(*scheme.offset->scheme, parameter_shape(scheme.offset->grouping, shape), chosen.zeros));
  return chosen;
}

uint32_t encode_value(const Scheme& scheme, const GroupParameters& p, float value, bool short_block) {
  const ElementType& type = *scheme.element;
  const float scaled = p.scale == 0 ? 0.0f : normalise(scheme, p.scale, value, short_block);
  // Rounded before the zero point is added, as PyTorch, GPTQ and AWQ do: on ties it matters.
  return type.nearest(type, p.offset == 0 ? scaled : std::nearbyint(scaled) + p.offset);
}

QuantizedTensor encode(const Scheme& scheme, const Shape& shape, std::span<const float> values,
                       const ChooseRange& choose) {
  BW_ASSERT(static_cast<int64_t>(values.size()) == element_count(shape));
  if (scheme.is_plain()) return encode_plain(scheme, shape, values);
  if (scheme.offset_kind == OffsetKind::bias && scheme.scale) return encode_around_mean(scheme, shape, values);
  check_encodable(scheme);
  return Encoder(scheme, shape, values, choose).run();
}

}  // namespace bitwright
