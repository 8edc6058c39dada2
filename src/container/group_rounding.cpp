#include "container/group_rounding.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on

void check_dtype(DType dtype) {
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) return;
  throw Error({.code = "bad-tensor",
               .what = "cannot quantize",
               .why = "weights of 16 and 32 bits are taken, this is " + std::string(info(dtype).name),
               .fix = "convert the model, for example by `bitwright dequantize --dtype float32`"});
}

std::vector<float> widened(WeightView weight, DType arithmetic) {
  check_dtype(weight.dtype);
  std::vector<float> values(weight.count());
  const size_t bytes = size_bytes(weight.dtype);
  parallel_ranges(values.size(), kChunk, [&](size_t begin, size_t end) {
    const auto part = std::span(values).subspan(begin, end - begin);
    to_f32(weight.dtype, weight.bytes.subspan(begin * bytes, part.size() * bytes), part);
    if (arithmetic != DType::f32 && arithmetic != weight.dtype)
      for (float& value : part) value = round_to(arithmetic, value);
    for (size_t i = 0; i < part.size(); ++i)
      if (!std::isfinite(part[i])) throw_not_finite(static_cast<int64_t>(begin + i), part[i]);
  });
  return values;
}

std::shared_ptr<const QuantizedTensor> stored(const Parameter& parameter, const Shape& shape,
                                              std::span<const float> values) {
  const Scheme& scheme = *parameter.scheme;
  QuantizedTensor t = encode(scheme, parameter_shape(parameter.grouping, shape), values);
  const std::vector<float> kept = decode(t);
  for (size_t g = 0; g < kept.size(); ++g)
    if (!std::isfinite(kept[g])) throw_scale_overflow(values[g], scheme.element->name);
  return std::make_shared<const QuantizedTensor>(std::move(t));
}

/// Runs of neighbours are rounded where they lie; others are gathered and put back.
class Rounder {
 public:
  Rounder(const GroupMap& groups, std::span<const float> values, std::span<std::byte> codes, const RoundGroup& round)
      : groups_(groups), values_(values), codes_(codes), round_(round) {}

  GroupParameters run(int64_t group) {
    std::vector<GroupMap::Run> runs;
    groups_.for_each_run(group, [&](GroupMap::Run run) { runs.push_back(run); });
    if (runs.size() == 1 && runs[0].stride == 1)
      return round_(values_.subspan(static_cast<size_t>(runs[0].start), static_cast<size_t>(runs[0].count)),
                    codes_.subspan(static_cast<size_t>(runs[0].start), static_cast<size_t>(runs[0].count)));
    gathered_.clear();
    for (const GroupMap::Run& run : runs)
      for (int64_t j = 0, i = run.start; j < run.count; ++j, i += run.stride)
        gathered_.push_back(values_[static_cast<size_t>(i)]);
    rounded_.resize(gathered_.size());
    const GroupParameters parameters = round_(gathered_, rounded_);
    size_t at = 0;
    for (const GroupMap::Run& run : runs)
      for (int64_t j = 0, i = run.start; j < run.count; ++j, i += run.stride)
        codes_[static_cast<size_t>(i)] = rounded_[at++];
    return parameters;
  }

 private:
  const GroupMap& groups_;
  std::span<const float> values_;
  std::span<std::byte> codes_;
  const RoundGroup& round_;
  std::vector<float> gathered_;
  std::vector<std::byte> rounded_;
};

}  // namespace

QuantizedTensor round_groups(const Scheme& scheme, const Shape& shape, WeightView weight, DType arithmetic,
                             const RoundGroup& round) {
  BW_ASSERT(scheme.element->code_bytes() == 1 && scheme.scale && scheme.scale->scheme->is_plain());
  const std::vector<float> values = widened(weight, arithmetic);
  const GroupMap groups(scheme.scale->grouping, shape);
  const auto count = static_cast<size_t>(groups.group_count());
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(values.size())};
  std::vector<float> scales(count), offsets(count);
  const size_t grain = std::max<size_t>(kChunk * count / std::max<size_t>(values.size(), 1), 1);
  parallel_ranges(count, grain, [&](size_t begin, size_t end) {
    Rounder rounder(groups, values, t.codes, round);
    for (size_t g = begin; g < end; ++g) {
      const GroupParameters p = rounder.run(static_cast<int64_t>(g));
      scales[g] = p.scale;
      offsets[g] = p.offset;
    }
  });
  t.scale = stored(*scheme.scale, shape, scales);
  if (scheme.offset) t.offset = stored(*scheme.offset, shape, offsets);
  return t;
}

}  // namespace bitwright
