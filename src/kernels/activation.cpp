#include "kernels/activation.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/decode.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

constexpr size_t kGrain = 4096;  // values
constexpr size_t kRowsATask = 16;

bool is_plain(const std::optional<Parameter>& parameter) { return !parameter || parameter->scheme->is_plain(); }

float only_value(const std::shared_ptr<const QuantizedTensor>& stored) {
  if (stored == nullptr || element_count(stored->shape) != 1)
    throw Error({.code = "bad-scheme",
                 .what = "cannot quantize activations",
                 .why = "their scales are said to be stored, and are not there"});
  return decode(*stored).front();
}

/// One scale for all tokens that comes from the values.
bool spans_tokens(const Scheme& scheme) { return scheme.scale->grouping.kind == Grouping::Kind::tensor; }

}  // namespace

bool ActivationQuantizer::supports(const ActivationScheme& activation) {
  const Scheme& s = activation.scheme;
  const bool offset = s.offset_kind == OffsetKind::none || s.offset_kind == OffsetKind::zero_point;
  if (!offset || !s.scale || s.scale->divides || s.factor != 1 || !is_plain(s.scale) || !is_plain(s.offset) ||
      s.element->bits > 8 || s.element->kind == ElementKind::block_code)
    return false;
  const Grouping& grouping = s.scale->grouping;
  if (!activation.dynamic) return grouping.kind == Grouping::Kind::tensor && activation.scale != nullptr;
  return spans_tokens(s) || (grouping.kind == Grouping::Kind::axis && grouping.axis == -1);
}

ActivationQuantizer::ActivationQuantizer(const ActivationScheme& activation) : scheme_(activation.scheme) {
  BW_ASSERT(supports(activation));
  if (activation.dynamic) return;
  const bool zero = scheme_.offset_kind == OffsetKind::zero_point;
  stored_ = {.scale = only_value(activation.scale), .offset = zero ? only_value(activation.offset) : 0};
  for (uint32_t code = 0; code < 1u << scheme_.element->bits; ++code)
    values_[code] = decode_value(scheme_, *stored_, scheme_.element->decode(*scheme_.element, code));
}

void ActivationQuantizer::apply(const float* x, size_t tokens, size_t columns, float* out) const {
  if (tokens == 0 || columns == 0) return;
  if (stored_) return apply_stored(x, tokens * columns, out);
  if (spans_tokens(scheme_)) return apply_dynamic(x, tokens, columns, out);
  parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
    apply_dynamic(x + begin * columns, end - begin, columns, out + begin * columns);
  });
}

void ActivationQuantizer::apply_stored(const float* x, size_t count, float* out) const {
  parallel_ranges(count, kGrain, [&](size_t begin, size_t end) {
    const std::span values(x + begin, end - begin);
    check_finite({.dtype = DType::f32, .bytes = std::as_bytes(values)}, static_cast<int64_t>(begin));
    const ElementType& type = *scheme_.element;
    if (type.kind != ElementKind::integer) {
      for (size_t i = begin; i < end; ++i) out[i] = values_[encode_value(scheme_, *stored_, x[i])];
      return;
    }
    // As PyTorch, whose fake quantization trained it: by the reciprocal.
    const float reciprocal = stored_->scale == 0 ? 0 : 1 / stored_->scale, zero = stored_->offset;
    for (size_t i = begin; i < end; ++i) {
      const float code = std::clamp(std::nearbyint(x[i] * reciprocal) + zero, type.lowest, type.highest);
      out[i] = (code - zero) * stored_->scale;
    }
  });
}

void ActivationQuantizer::apply_dynamic(const float* x, size_t tokens, size_t columns, float* out) const {
  const std::span values(x, tokens * columns);
  const QuantizedTensor codes = encode(scheme_, {static_cast<int64_t>(tokens), static_cast<int64_t>(columns)},
                                       {.dtype = DType::f32, .bytes = std::as_bytes(values)}, RangeRule::minmax);
  decode(codes, {out, tokens * columns});
}

}  // namespace bitwright
