#include "kernels/decode.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kDecodeGrain = size_t{1} << 16;
constexpr size_t kBuffer = 4096;  ///< values decoded at a time: they stay in the first-level cache

double merge(double (&lanes)[kPanel]) {
  for (size_t half = kPanel / 2; half > 0; half /= 2)
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

using Form = GroupDecoding::Form;

/// Nothing where the kernels have no such form.
std::optional<Form> form_of(const Scheme& scheme) {
  const bool divides = scheme.scale && scheme.scale->divides;
  switch (scheme.offset_kind) {
    case OffsetKind::none:
      return divides ? Form::divide : Form::scale;
    case OffsetKind::zero_point:
    case OffsetKind::float_zero:
    case OffsetKind::shift:
      return Form::subtract_scale;
    case OffsetKind::bias:
      if (!divides) return Form::scale_add;
      break;
    case OffsetKind::minimum:
      if (!divides) return Form::scale_subtract;
      break;
  }
  return std::nullopt;
}

bool has_kernel(const QuantizedTensor& t) {
  const Scheme& scheme = t.scheme;
  if (scheme.element->bits > 8 || scheme.element->kind == ElementKind::block_code || !form_of(scheme)) return false;
  if (!scheme.scale) return scheme.is_plain();
  return !scheme.offset || scheme.offset->grouping == scheme.scale->grouping || element_count(t.offset->shape) == 1;
}

GroupDecoding make_decoding(const Scheme& scheme) {
  using Element = GroupDecoding::Element;
  const ElementType& type = *scheme.element;
  GroupDecoding d = {.element = type.bits == 4 ? Element::table16 : Element::table256,
                     .bits = type.bits,
                     .form = form_of(scheme).value(),
                     .offset = scheme.shift,
                     .factor = scheme.factor};
  if (type.kind == ElementKind::integer) d.element = type.lowest < 0 ? Element::is_signed : Element::is_unsigned;
  for (uint32_t code = 0; code < 1u << type.bits; ++code) d.values.at(code) = type.decode(type, code);
  return d;
}

std::vector<float> decode_parameters(const QuantizedTensor& stored, const KernelLevel& level) {
  std::vector<float> values(static_cast<size_t>(element_count(stored.shape)));
  decode(stored, values, level);
  return values;
}

}  // namespace

std::optional<ParameterLines> parameter_lines(const Grouping& grouping, const Shape& shape) {
  const int64_t count = element_count(shape);
  if (count == 0) return std::nullopt;
  const int64_t columns = shape.empty() ? 1 : shape.back(), rows = shape.size() < 2 ? 1 : shape[shape.size() - 2];
  const bool across = grouping.kind == Grouping::Kind::axis && grouping.axis == -2;
  ParameterLines lines = {.line = columns, .size = grouping.size, .parameters = 1};
  if (grouping.kind == Grouping::Kind::tensor) {
    lines.line = lines.size = rows * columns;
  } else if (across) {
    lines = {.line = columns, .size = 1, .parameters = columns, .in_matrix = rows, .sharing = grouping.size};
    if (lines.sharing == 0) lines.sharing = rows;
  } else if (grouping.kind == Grouping::Kind::flat && grouping.interleaved) {
    const int64_t groups = count / grouping.size;
    lines = {.line = groups, .size = 1, .parameters = groups, .in_matrix = grouping.size, .sharing = grouping.size};
  } else if (grouping.kind == Grouping::Kind::flat) {
    lines.line = count;
  } else if (grouping.kind == Grouping::Kind::block) {
    lines.size = grouping.block_columns;
    lines.in_matrix = rows;
    lines.sharing = grouping.block_rows;
  } else if (lines.size == 0) {
    lines.size = columns;
  }
  if (lines.size != 1) lines.parameters = (lines.line - 1) / lines.size + 1;
  if (lines.in_matrix == 1 && lines.line % lines.size == 0 && grouping.kind != Grouping::Kind::index) {
    lines.parameters *= count / lines.line;  // one long line
    lines.line = count;
  }
  return lines;
}

RangeDecoder::RangeDecoder(const QuantizedTensor& tensor, const KernelLevel& level) : tensor_(tensor), level_(level) {
  const Scheme& scheme = tensor.scheme;
  if (scheme.scale) GroupMap(scheme.scale->grouping, tensor.shape, tensor.group_index);  // throws if it does not apply
  const auto lines = parameter_lines(scheme.scale ? scheme.scale->grouping : Grouping::flat(INT64_MAX), tensor.shape);
  if (!lines || !has_kernel(tensor)) {
    definition_.emplace(tensor);
    return;
  }
  lines_ = *lines;
  decoding_ = make_decoding(scheme);
  scales_ = scheme.scale ? decode_parameters(*tensor.scale, level) : std::vector<float>(1, 1.0f);
  if (!scheme.offset) return;
  offsets_ = decode_parameters(*tensor.offset, level);
  if (scheme.offset->grouping != scheme.scale->grouping) offsets_.resize(scales_.size(), offsets_.front());
}

bool RangeDecoder::takes_codes(const QuantizedTensor& tensor) {
  return has_kernel(tensor) && element_count(tensor.shape) > 0;
}

void RangeDecoder::decode(int64_t begin, std::span<float> out) const {
  if (definition_) return definition_->decode(begin, out);
  const auto first = static_cast<size_t>(begin);
  BW_ASSERT(first <= tensor_.codes.size() && out.size() <= tensor_.codes.size() - first);
  decode(begin, std::span(tensor_.codes).subspan(first, out.size()), out);
}

void RangeDecoder::decode(int64_t begin, std::span<const std::byte> codes, std::span<float> out) const {
  BW_ASSERT(!definition_ && codes.size() == out.size());
  for (size_t i = 0; i < out.size();) {
    const int64_t at = begin + static_cast<int64_t>(i), in_line = at % lines_.line;
    const auto part = out.subspan(i, std::min(out.size() - i, static_cast<size_t>(lines_.line - in_line)));
    decode_line(&codes[i], in_line, lines_.first(at / lines_.line), part);
    i += part.size();
  }
}

void RangeDecoder::decode_line(const std::byte* codes, int64_t in_line, int64_t first, std::span<float> out) const {
  const auto begin = static_cast<size_t>(in_line), parameter = static_cast<size_t>(first);
  if (!tensor_.group_index.empty())
    return level_.decode_groups(decoding_, numbers(parameter, &tensor_.group_index[begin]), codes, 1, out.size(),
                                out.data());
  const auto size = static_cast<size_t>(lines_.size);
  for (size_t i = 0; i < out.size();) {
    const size_t at = begin + i;
    // Whole groups together, up to the line's short one.
    const size_t count = std::min(size - at % size, out.size() - i);
    const size_t groups = count == size ? (out.size() - i) / size : 1;
    level_.decode_groups(decoding_, numbers(parameter + at / size, nullptr), codes + i, count, groups, &out[i]);
    i += count * groups;
  }
}

void decode(const QuantizedTensor& tensor, std::span<float> out, const KernelLevel& level) {
  BW_ASSERT(static_cast<int64_t>(out.size()) == element_count(tensor.shape));
  const RangeDecoder decoder(tensor, level);
  parallel_ranges(out.size(), kDecodeGrain, [&](size_t begin, size_t end) {
    decoder.decode(static_cast<int64_t>(begin), out.subspan(begin, end - begin));
  });
}

void decode_groups(const GroupDecoding& d, const GroupNumbers& numbers, const std::byte* codes, size_t size,
                   size_t groups, float* out) {
  const auto value = [&d](float e, float s, float z) {
    switch (d.form) {
      case Form::scale:
        return e * s * d.factor;
      case Form::divide:
        return e / s * d.factor;
      case Form::subtract_scale:
        return (e - z) * s * d.factor;
      case Form::scale_add:
        return e * s * d.factor + z;
      case Form::scale_subtract:
        return e * s * d.factor - z;
    }
    return 0.0f;
  };
  for (size_t g = 0; g < groups; ++g) {
    const size_t number = numbers.index == nullptr ? g : static_cast<size_t>(numbers.index[g]);
    const float offset = numbers.offsets == nullptr ? d.offset : numbers.offsets[number];
    for (size_t i = g * size; i < (g + 1) * size; ++i)
      out[i] = value(d.values[std::to_integer<size_t>(codes[i])], numbers.scales[number], offset);
  }
}

void add_squares(DType dtype, const std::byte* original, const float* decoded, size_t count,
                 double (&difference)[kPanel], double (&norm)[kPanel]) {
  const size_t bytes = size_bytes(dtype);
  for (size_t i = 0; i < count; ++i) {
    float value = 0;
    to_f32(dtype, {original + i * bytes, bytes}, std::span(&value, 1));
    const double w = value, d = w - static_cast<double>(decoded[i]);
    difference[i % kPanel] = std::fma(d, d, difference[i % kPanel]);
    norm[i % kPanel] = std::fma(w, w, norm[i % kPanel]);
  }
}

SquaredError& SquaredError::operator+=(const SquaredError& other) {
  difference += other.difference;
  norm += other.norm;
  return *this;
}

double SquaredError::relative() const { return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm); }

SquaredError squared_error(const RangeDecoder& decoder, int64_t begin, WeightView original, const KernelLevel& level) {
  BW_ASSERT(original.count() <= static_cast<size_t>(kErrorPiece));
  const bool native = original.dtype == DType::f16 || original.dtype == DType::bf16 || original.dtype == DType::f32;
  const size_t bytes = size_bytes(original.dtype);
  std::array<float, kBuffer> decoded, wide;
  double difference[kPanel] = {}, norm[kPanel] = {};
  for (size_t first = 0; first < original.count(); first += kBuffer) {
    const size_t count = std::min(kBuffer, original.count() - first);
    decoder.decode(begin + static_cast<int64_t>(first), std::span(decoded).first(count));
    const std::span<const std::byte> values = original.bytes.subspan(first * bytes, count * bytes);
    if (!native) to_f32(original.dtype, values, std::span(wide).first(count));
    const std::byte* const from = native ? values.data() : std::as_bytes(std::span(wide)).data();
    level.add_squares(native ? original.dtype : DType::f32, from, decoded.data(), count, difference, norm);
  }
  return {.difference = merge(difference), .norm = merge(norm)};
}

SquaredError squared_error(WeightView original, const QuantizedTensor& tensor, const KernelLevel& level) {
  BW_ASSERT(static_cast<int64_t>(original.count()) == element_count(tensor.shape));
  const RangeDecoder decoder(tensor, level);
  const size_t grain = static_cast<size_t>(kErrorPiece), bytes = size_bytes(original.dtype);
  std::vector<SquaredError> pieces((original.count() + grain - 1) / grain);
  parallel_ranges(original.count(), grain, [&](size_t begin, size_t end) {
    const WeightView piece = {original.dtype, original.bytes.subspan(begin * bytes, (end - begin) * bytes)};
    pieces[begin / grain] = squared_error(decoder, static_cast<int64_t>(begin), piece, level);
  });
  SquaredError total;
  for (const SquaredError& piece : pieces) total += piece;
  return total;
}

double relative_error(WeightView original, const QuantizedTensor& tensor, const KernelLevel& level) {
  return squared_error(original, tensor, level).relative();
}

}  // namespace bitwright
